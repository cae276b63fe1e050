"""Runs that start from the weights of others: what is taken over, recorded, and refused on resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import TINY, TINY_FIELDS, final, metrics, mistake

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.config.pretrain import ENCODER_SETTINGS, INPUT_SETTINGS, PretrainConfig
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes, weights_hash
from dmjd.encoders.weights import load_encoder
from dmjd.images.preprocess import Preprocess
from dmjd.interop.export import formats_of
from dmjd.pretraining.settings import resolve_paths
from dmjd.runs.build import build_model, load_model, read_config
from dmjd.runs.start import read_start

FIELDS = TINY_FIELDS | {"batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory, image_folder) -> Path:
    """A run of 32 x 32 pixels and three channels."""
    out = tmp_path_factory.mktemp("start") / "source"
    fields = FIELDS | {"steps": 3, "mean": (0.4,) * 3, "std": (0.3,) * 3}
    dmjd.pretrain(recipes.digits(str(image_folder), str(out), **fields))
    return out


@pytest.fixture(scope="module")
def config_of(image_folder):
    """(run folder, source, other settings) -> configuration of a run of one step."""

    def config(out: Path, source: Path | str, **changes: object) -> PretrainConfig:
        return recipes.digits(str(image_folder), str(out), init=str(source), **FIELDS | {"steps": 1} | changes)

    return config


def test_a_run_takes_encoder_and_size_from_the_weights_and_resumes_without_them(source, tmp_path, image_folder):
    """Nothing is told but the source; the folder of the source may be gone when the run goes on."""
    moved = shutil.copytree(source, tmp_path / "source")
    given = {"init": str(moved), "batch_size": 8, "num_workers": 0, "decoder_dim": 16, "decoder_depth": 1}
    config = recipes.folder(str(image_folder), str(tmp_path / "run"), decoder_heads=1, **given)
    assert dmjd.pretrain(config.replace(steps=1)).finished
    stored, theirs = read_config(tmp_path / "run"), read_config(source)
    for name in (*ENCODER_SETTINGS, *INPUT_SETTINGS):
        assert getattr(stored, name) == getattr(theirs, name), name
    assert stored.from_init is None
    shutil.rmtree(moved)
    assert dmjd.pretrain(config.replace(steps=2)).step == 2
    assert read_config(tmp_path / "run") == stored.replace(steps=2)


def test_adapt_keeps_the_start_as_a_target(source, tmp_path, image_folder):
    """The copy has the weights of the start to the end, and the encoder does not."""
    given = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 1, "batch_size": 8, "num_workers": 0}
    given |= {"init_freeze": 0.25, "eval_every": 1}
    config = recipes.adapt(str(image_folder), str(tmp_path), init=str(source), steps=4, **given)
    dmjd.pretrain(config)
    model, stored = load_model(tmp_path)
    start = load_encoder(source).state_dict()
    copy = model.branch_targets["vis"].copy.state_dict()
    assert (stored.encoder, stored.recipe) == ("vit_tiny_patch8", "adapt")
    assert all(torch.equal(copy[key], value) for key, value in start.items())
    assert not torch.equal(model.encoder.state_dict()["blocks.1.mlp.fc2.weight"], start["blocks.1.mlp.fc2.weight"])
    assert any("drift_cosine" in line for line in metrics(tmp_path))


def test_bench_measures_the_encoder_of_the_weights(source):
    result = dmjd.bench(recipes.folder(init=str(source), batch_size=2), steps=1)
    assert result["settings"]["encoder"] == "vit_tiny_patch8"
    assert result["settings"]["img_size"] == (32,)


def test_the_encoder_starts_from_the_weights_and_the_rest_is_fresh(source, tmp_path, config_of):
    config = config_of(tmp_path, source, seed=5)
    config, start = read_start(config, tmp_path)
    model, random = build_model(config, start), build_model(config.replace(init=None, init_hash=None))
    trained = load_encoder(source).state_dict()
    for key, value in model.state_dict().items():
        expected = trained[key.removeprefix("encoder.")] if key.startswith("encoder.") else random.state_dict()[key]
        assert torch.equal(value, expected), key
    assert str(start) == f"29 of 29 encoder tensors from {source}; decoder fresh"


def test_a_run_records_what_it_starts_from(source, tmp_path, capsys, config_of):
    """In the banner, in config.json and in a file; mean and std come from the weights, the size does not."""
    dmjd.pretrain(config_of(tmp_path, source, img_size=(48, 64)))
    shown = capsys.readouterr().err
    summary = f"29 of 29 encoder tensors from {source}, positions computed 4 x 4 -> 6 x 8; decoder fresh"
    assert f"  init     {summary}\n" in shown
    assert "mean and std of the weights; channels of the weights" in shown
    assert f"  exports  {', '.join(formats_of(load_encoder(source)))} (dmjd export); features (dmjd embed)" in shown
    expected = weights_hash(load_encoder(source))
    assert read_config(tmp_path).init_hash == expected
    record = json.loads((tmp_path / "initialization.json").read_text())
    assert (record["hash"], record["loaded"], record["wanted"], record["fresh"]) == (expected, 29, 29, [])
    assert record["summary"] == summary
    preprocess = load_encoder(tmp_path).preprocess
    assert (preprocess.mean, preprocess.std, preprocess.img_size) == ((0.4,) * 3, (0.3,) * 3, (48, 64))
    assert load_model(tmp_path)[1].init == str(source)


def test_folder_has_one_method_whether_or_not_the_size_of_the_weights_is_given(source, tmp_path):
    starts = [recipes.folder(init=str(source), **given) for given in ({}, {"img_size": 32})]
    without, given = (read_start(start, tmp_path)[0] for start in starts)
    assert without == given
    assert (given.img_size, given.mask_ratio) == ((32,), 0.85)


@pytest.mark.parametrize("role", ["init", "teacher"])
def test_another_value_range_than_that_of_the_weights_is_named(role, tmp_path, image_folder, capsys):
    """They would see other brightnesses than they know."""
    source = create_encoder("vit_tiny_patch8", 32, embed_dim=32, depth=1, num_heads=2)
    source.preprocess = Preprocess((32, 32), 3, (0.4,) * 3, (0.3,) * 3, (10.0, 90.0))
    (tmp_path / "source.safetensors").write_bytes(encoder_bytes(source))
    given = FIELDS | {"steps": 1, role: str(tmp_path / "source.safetensors"), "depth": (1,)}
    given |= {"target": "teacher"} if role == "teacher" else {}
    for name, own in (("other", None), ("same", (10.0, 90.0))):
        dmjd.pretrain(recipes.digits(str(image_folder), str(tmp_path / name), value_range=own, **given))
        shown = " ".join(capsys.readouterr().err.split())
        assert (f"--{role} {tmp_path}/source.safetensors was trained with --value-range 10 90" in shown) == (
            own is None
        )


def test_given_mean_and_std_win_and_other_channels_are_measured(source, tmp_path, config_of):
    dmjd.pretrain(config_of(tmp_path / "given", source, mean=(0.1,) * 3, std=(0.9,) * 3))
    assert load_encoder(tmp_path / "given").preprocess.mean == (0.1,) * 3
    dmjd.pretrain(config_of(tmp_path / "gray", source, in_chans=1))
    measured = load_encoder(tmp_path / "gray").preprocess
    assert measured.in_chans == 1
    assert measured.mean != (0.4,)


def test_a_resumed_run_does_not_need_the_weights_again(source, tmp_path, config_of):
    gone, out, whole = tmp_path / "gone", tmp_path / "run", tmp_path / "whole"
    shutil.copytree(source, gone)
    dmjd.pretrain(config_of(whole, gone, steps=4))
    dmjd.pretrain(config_of(out, gone, steps=2))
    shutil.rmtree(gone)
    assert dmjd.pretrain(config_of(out, gone, steps=4)).step == 4
    assert read_config(out).init_hash == read_config(whole).init_hash
    model, _ = load_model(out)
    assert set(final(out)) >= {f"model.{key}" for key in model.state_dict()}
    assert metrics(out)[0]["loss"] == metrics(whole)[0]["loss"]


def test_a_resumed_run_of_other_weights_is_refused(source, tmp_path, capsys, image_folder):
    out = tmp_path / "run"
    start = [
        "pretrain",
        "digits",
        *TINY,
        "--data",
        image_folder,
        "--batch-size",
        "8",
        "--num-workers",
        "0",
        "--out",
        out,
    ]
    assert main([str(word) for word in (*start, "--steps", "1", "--init", source)]) == 0
    capsys.readouterr()
    for more, now in ((["--init", GOLDEN_RUN], GOLDEN_RUN), ([], "random weights")):
        text = mistake(capsys, *start, "--steps", "2", *more)
        assert f"{out} began from {source} (hash " in text
        assert f"), not from {now}" in text
        assert len(text.splitlines()) == 1
    text = mistake(capsys, *start, "--steps", "2", "--init", source, "--init-hash", "0" * 16)
    assert f"(hash {'0' * 16})" in text
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    text = mistake(capsys, *start[:-1], plain, "--init", source)
    assert f"{plain} began from random weights, not from {source}" in text


GOLDEN_RUN = Path(__file__).parents[1] / "golden" / "run_v0.1"


def test_a_relative_source_is_recorded_with_its_whole_path(source, tmp_path, monkeypatch, config_of):
    """So that the run can be resumed from any folder."""
    monkeypatch.chdir(source.parent)
    for given, whole in (("source", source), ("local-dir:source", f"local-dir:{source}")):
        assert resolve_paths(config_of(tmp_path, given)).init == str(whole)
    assert resolve_paths(config_of(tmp_path, "vit_tiny_patch16_224")).init == "vit_tiny_patch16_224"


def test_the_hash_of_the_weights_may_be_prescribed(source, tmp_path, config_of):
    expected = weights_hash(load_encoder(source))
    config, _ = read_start(config_of(tmp_path, source, init_hash=expected), tmp_path)
    assert config.init_hash == expected
    with pytest.raises(ValueError, match=rf"the hash of its weights is {expected}, not abc \(--init-hash\)"):
        read_start(config_of(tmp_path, source, init_hash="abc"), tmp_path)


def test_the_decoder_is_taken_over_on_request(source, tmp_path, config_of):
    config, start = read_start(config_of(tmp_path, source, init_decoder=True, img_size=(64,)), tmp_path)
    model = build_model(config, start)
    stored = load_file(source / "checkpoints" / "final.safetensors")
    taken = [key for key in model.state_dict() if key.startswith("branches.")]
    for key in taken:
        if not key.endswith("pos_embed"):  # computed for the grid
            assert torch.equal(model.state_dict()[key], stored[f"model.{key}"]), key
    assert str(start).endswith(f"; decoder taken over ({len(taken) - 1} tensors)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder_dim": 64},
            r"has a decoder of other settings: branches\.mim\.decoder\.\S+ is \[32\] there and \[64\]",
        ),
        ({"decoder_depth": 2}, r"branches\.mim\.decoder\.blocks\.1\.attn\.proj\.bias is missing there and \[32\] here"),
        ({"vis": False}, r"branches\.vis\.head\..* there and missing here"),
        ({"decoder_heads": 4}, "has a decoder of 2 attention heads, not 4: give --decoder-heads 2$"),
    ],
)
def test_a_decoder_of_other_settings_is_refused(changes, message, source, tmp_path, config_of):
    config, start = read_start(config_of(tmp_path, source, init_decoder=True, **changes), tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        build_model(config, start)
    assert "\n" not in str(refused.value)


def test_a_source_without_a_decoder(source, tmp_path, config_of):
    file = source / "encoder.safetensors"
    config, start = read_start(config_of(tmp_path, file, init_decoder=True), tmp_path)
    with pytest.raises(ValueError, match=r"--init-decoder: .*encoder\.safetensors holds no decoder"):
        build_model(config, start)


def test_a_target_that_follows_the_encoder_starts_from_the_weights_too(source, tmp_path, config_of):
    config, start = read_start(config_of(tmp_path, source, target="ema"), tmp_path)
    state = build_model(config, start).state_dict()
    copies = [key for key in state if key.startswith("branch_targets.") and key.endswith("patch_embed.proj.weight")]
    assert copies
    for key in copies:
        assert torch.equal(state[key], load_encoder(source).patch_embed.proj.weight)


def test_settings_that_go_together(source, tmp_path, config_of):
    for settings in ({"init_decoder": True}, {"init_hash": "a"}, {"init_fresh": ("a",)}):
        with pytest.raises(ValueError, match="need --init"):
            recipes.digits(**settings)
    config = config_of(tmp_path / "run", source)
    with pytest.raises(ValueError, match="give either a model, which has its weights, or init"):
        dmjd.pretrain(config, model=build_model(config))
    assert not (tmp_path / "run").exists()


def test_recipes_that_need_a_model_say_so(tmp_path, capsys):
    for recipe, flag in (("adapt", "give --init"), ("distill", "needs a teacher: --teacher")):
        assert flag in mistake(capsys, "pretrain", recipe, "--data", "digits", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["--init", "resnet18"], "is not a ViT: its class is ResNet"),
        (["--init", ""], "--init must not be empty"),
        (["--init", "{source}", "--depth", "3"], "12 of 41 tensors would stay fresh: blocks.2."),
        (["--init", "{source}", "--img-size", "36"], "36 x 36 is not divisible by the encoder's 8-pixel patch"),
        (["--init", "{source}", "--class-token"], "1 of 30 tensors would stay fresh: cls_token"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(flags, message, source, tmp_path, capsys):
    words = [word.format(source=source) for word in flags]
    text = mistake(capsys, "pretrain", "digits", *TINY, "--out", tmp_path / "run", *words)
    assert message in text
    assert len(text.splitlines()) <= 2  # the second names the help, for a wrong flag
    assert not (tmp_path / "run").exists()
