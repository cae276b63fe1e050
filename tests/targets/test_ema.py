"""The ema target: a copy that follows the encoder slowly, resumes bit for bit, and warns about a collapse."""

import json
import math
import signal

import pytest
import torch
from support import TINY_FIELDS, assert_same_bits, metrics

from dmjd import ComplementaryMasks, Distillation, MaskedImageModel, Reconstruction, create_encoder, pretrain
from dmjd.config import recipes
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.base import Encoder
from dmjd.figures.show import show
from dmjd.runs.build import build_model
from dmjd.targets.base import whiten
from dmjd.targets.ema import COLLAPSED, EmaSettings, EmaTarget, feature_deviation
from dmjd.targets.registry import create_target


def encoder(name: str = "vit_tiny_patch8", **options) -> Encoder:
    torch.manual_seed(0)
    sizes = (
        {"embed_dim": 32, "depth": 4} if name.startswith("vit") else {"embed_dims": (16, 24, 32), "depths": (1, 1, 4)}
    )
    return create_encoder(name, 32, num_heads=2, **sizes | options)


def normalized(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_blocks_are_targets_of_their_own_normalized_over_the_whole_image(name):
    source = encoder(name)
    target = EmaTarget(source, EmaSettings(layers=3))
    images = normalized()
    actual = target(images, torch.full_like(images, float("nan")))
    outputs = source.eval().block_outputs(images, 4)
    assert actual.shape == (3, 16, target.dim)
    for found, block in zip(actual.chunk(3, dim=2), outputs[1:], strict=True):
        deviation, mean = torch.std_mean(block, dim=1, correction=0, keepdim=True)
        torch.testing.assert_close(found, (block - mean) / (deviation**2 + 1e-5).sqrt(), rtol=1e-3, atol=1e-3)
    assert EmaTarget(source).dim == 2 * source.embed_dim  # half of four


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_the_mean_is_that_of_the_last_blocks_of_the_whole_image_whitened(name):
    source = encoder(name, drop_path=0.5)
    target = EmaTarget(source, EmaSettings(layers=2, joined=False)).train()  # stochastic depth stays off
    images = normalized()
    actual = target(images, torch.full_like(images, float("nan")))
    outputs = source.eval().block_outputs(images, 4)
    assert torch.equal(outputs[-1], source(images))
    torch.testing.assert_close(actual, whiten((whiten(outputs[2]) + whiten(outputs[3])) / 2))
    torch.testing.assert_close(
        EmaTarget(source, EmaSettings(layers=1, joined=False))(images, images), whiten(outputs[3])
    )
    assert EmaTarget(source).layers == 2  # half of four
    assert actual.shape == (3, 16, target.dim)


def test_tokens_without_valid_pixels_do_not_count():
    source = encoder()
    target = EmaTarget(source, EmaSettings(layers=2))
    images, valid = normalized(), torch.ones(3, 3, 32, 32, dtype=torch.bool)
    torch.testing.assert_close(target.of_valid(images, images, valid), target(images, images), rtol=1e-4, atol=1e-4)
    valid[0, :, 8:], valid[1] = False, False  # the first row of tokens is left, nothing is left
    found = target.of_valid(images, images, valid)
    assert found.isfinite().all()
    assert not found[0, 4:].any()
    assert not found[1].any()
    first = found[0, :4]
    torch.testing.assert_close(first.mean(0), torch.zeros(target.dim), rtol=0, atol=1e-4)
    torch.testing.assert_close(first.var(0, correction=0), torch.ones(target.dim), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[2], target(images, images)[2], rtol=1e-4, atol=1e-4)


def test_a_class_token_is_dropped():
    assert EmaTarget(encoder(class_token=True))(normalized(), normalized()).shape == (3, 16, 2 * 32)


def test_momentum_rises_to_one_by_half_a_cosine():
    target = EmaTarget(encoder(), EmaSettings(momentum=0.9))
    assert [round(target.momentum_at(progress), 6) for progress in (0.0, 0.5, 1.0)] == [0.9, 0.95, 1.0]
    assert target.momentum_at(0.25) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2)


def test_the_copy_moves_by_the_momentum_at_the_progress_of_the_run():
    model = MaskedImageModel(encoder(), mim=Reconstruction(target="ema"), vis=Distillation(target="ema"))
    target = model.target("mim")
    before = [p.clone() for p in target.copy.parameters()]
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    model.after_step(5, progress=0.5)
    for old, new in zip(before, target.copy.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.002, rtol=0, atol=2e-6)
    model.after_step(6, progress=1.0)  # momentum 1: it does not move
    for old, new in zip(before, target.copy.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.002, rtol=0, atol=2e-6)


def test_one_pass_for_all_views_and_no_gradient():
    model = MaskedImageModel(
        encoder(), ComplementaryMasks(4), Reconstruction(target="ema"), Distillation(target="ema")
    ).train()
    passes = []
    model.target("mim").copy.blocks[-1].register_forward_hook(lambda *_: passes.append(1))
    raw = normalized() * 50 + 128
    out = model(normalized(), raw, keys=torch.arange(3))
    out["loss"].backward()
    assert len(passes) == 1
    assert model.target("vis") is model.target("mim")
    assert all(p.grad is None and not p.requires_grad for p in model.target("mim").parameters())
    whitened = whiten(model.target("mim").copy.block_outputs(normalized(), 1)[0])
    assert float(out["target_std"]) == pytest.approx(float(feature_deviation(whitened)))


def test_it_computes_in_the_runs_precision_and_returns_float32():
    model = MaskedImageModel(encoder(), vis=Distillation(target="ema"))
    seen = []
    model.target("vis").copy.blocks[-1].mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = model.targets(normalized(), normalized() * 50 + 128)
    assert seen == [torch.bfloat16]
    assert {x.dtype for x in targets.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, "ema_layers must be 1 to 4"),
        ({"momentum": 1.5}, "ema_momentum must lie between 0 and 1"),
        ({"joined": 1}, "ema_joined must be bool"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        create_target("ema", encoder(), **options)


@pytest.mark.parametrize("joined", [True, False])
def test_a_copy_whose_features_hardly_differ_counts_as_collapsed(joined):
    """Normalizing over the image makes small differences large, and in bf16 rounding errors too."""
    model = MaskedImageModel(encoder(), mim=Reconstruction(target=EmaSettings(joined=joined)), vis=None)
    with torch.no_grad():
        model.target("mim").copy.patch_embed.proj.weight.mul_(1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(normalized(), normalized() * 50 + 128)
    assert float(out["target_std"]) < COLLAPSED


def test_deviation_sees_both_kinds_of_collapse():
    features = whiten(torch.randn(8, 16, 64))
    assert float(feature_deviation(features)) > 0.8
    assert float(feature_deviation(features[:1, :1].expand(8, 16, 64))) < 1e-6  # all the same
    assert float(feature_deviation(features[:1].expand(8, 16, 64))) < 1e-6  # every image the same
    assert float(feature_deviation(features[:1])) > 0.8  # the tokens of a single image are compared


def config(image_folder, out, **changes):
    fields = TINY_FIELDS | {"steps": 9, "batch_size": 8, "checkpoint_every": 4, "drop_path": 0.2, "ema_momentum": 0.9}
    return recipes.folder(str(image_folder), str(out), **fields | {"target": "ema"} | changes)


def test_a_stopped_run_ends_with_the_same_bits(tmp_path, image_folder):
    """The copy is saved and the momentum follows the progress, also if targets differ between branches."""

    def stop(report):
        if report.state.step == 5:
            signal.raise_signal(signal.SIGTERM)

    mixed = {"target": "hog", "vis_target": "ema"}
    pretrain(config(image_folder, tmp_path / "straight", **mixed))
    assert not pretrain(config(image_folder, tmp_path / "stopped", **mixed), hooks=[stop]).finished
    assert pretrain(config(image_folder, tmp_path / "stopped", **mixed)).finished
    assert_same_bits(tmp_path / "straight", tmp_path / "stopped")
    lines = [m["target_std"] for m in metrics(tmp_path / "straight")]
    assert lines == [m["target_std"] for m in metrics(tmp_path / "stopped")]
    assert min(lines) > COLLAPSED
    assert show("targets", tmp_path / "straight", out=tmp_path / "t.png", num_images=2).stat().st_size > 1000


def test_a_run_of_a_former_version_keeps_the_mean_of_its_blocks(tmp_path, image_folder):
    """Its configuration does not say so. Other targets have nothing to keep."""
    runs = {}
    for target in ("ema", "hog"):
        runs[target] = config(image_folder, tmp_path / target, target=target, ema_joined=target != "ema", steps=2)
        pretrain(runs[target])
        file = tmp_path / target / "config.json"
        written = json.loads(file.read_text())
        del written["ema_joined"]
        file.write_text(json.dumps(written))
        assert PretrainConfig.from_json(file.read_text()).ema_joined == (target != "ema")
    longer = runs["ema"].replace(steps=3)
    with pytest.raises(ValueError, match="\n  ema_joined: False -> True"):
        pretrain(longer.replace(ema_joined=True))
    assert pretrain(longer).step == 3
    assert pretrain(runs["hog"].replace(steps=3)).step == 3


def test_a_collapse_is_reported_when_it_happens_and_at_the_end(tmp_path, image_folder, capsys):
    """An encoder with zero weights represents one that has collapsed."""
    settings = config(image_folder, tmp_path / "run")
    model = build_model(settings)
    for part in (model.encoder, model.target("mim").copy):
        part.patch_embed.proj.weight.requires_grad_(False).zero_()
    result = pretrain(settings, model=model)
    assert result.metrics["target_std"] < COLLAPSED
    reported = capsys.readouterr().err
    assert reported.count("step 1: the ema target has collapsed") == 1
    assert "at the end of the run: the ema target has collapsed" in reported
    assert "step 2: the ema" not in reported
