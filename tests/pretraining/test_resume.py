"""Resuming with other settings: each is refused by name before anything is read, or allowed and takes effect."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
from support import TINY_FIELDS, assert_same_bits, metrics

import dmjd
from dmjd.config import recipes
from dmjd.config.pretrain import DURATIONS, PretrainConfig

# Another value of every setting that a run must keep, except those of the next two tables.
OTHER = {
    "recipe": "fast",
    "img_size": 24,
    "in_chans": 1,
    "value_range": (0, 1),
    "crop_scale": (0.3, 1),
    "flip": True,
    "encoder": "vit_small_patch8",
    "class_token": True,
    "drop_path": 0.1,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 4,
    "mlp_ratio": 2,
    "target": "pixel",
    "mim_target": "hog",
    "vis_target": "pixel",
    "hog_cell": 8,
    "hog_bins": 8,
    "hog_color": False,
    "teacher_layers": 2,
    "teacher_skip": 1,
    "teacher_size": 64,
    "ema_layers": 1,
    "ema_momentum": 0.9,
    "ema_joined": False,
    "num_views": 1,
    "mask_ratio": 0.5,
    "pred_ratio": 0.75,
    "block_size": 2,
    "masks": "independent",
    "mim": False,
    "vis": False,
    "theta": 0.5,
    "mim_loss": "smooth_l1",
    "vis_loss": "l2",
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "decoder_mlp_ratio": 2,
    "decode_ratio": 0.5,
    "projector_depth": 2,
    "held_out": 2,
    "batch_size": 4,
    "accumulate": 2,
    "blr": 1e-3,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "schedule": "wsd",
    "warmup": 0.5,
    "layer_decay": 0.9,
    "init_freeze": 0.1,
    "clip_grad": 1,
    "seed": 1,
    "precision": "bf16",
    "compile": True,
    "nodata": "auto",
    "alpha": "invalid",
    "shard_window": 2,
}
LENGTHS = {"steps": 3, "epochs": 100, "minutes": 5}  # shorter, or in another unit
TOGETHER = {"mean": (0.1,) * 3, "std": (0.1,) * 3}

# Settings that may change, with values whose effect is tested.
ALLOWED = {
    "steps": 6,
    "labels": "folder",
    "num_workers": 1,
    "max_unreadable": 0,
    "device": "auto",
    "grad_checkpointing": True,
    "checkpoint_every": 5,
    "log_every": 2,
    "eval_every": 3,
    "final_eval": True,
    "report": True,
}
ELSEWHERE = {"data", "out", "resume", "wandb", "test_data", "teacher", "cooldown_now", "data_may_grow"} | {
    "root",
    "path_column",
    "label_column",
    "cache_dir",
    "cache_gb",
    "strategy",
    "checkpoint_type",
}  # may change, tested elsewhere
WSD = {"warmup_steps", "cooldown"}  # must stay, need the schedule wsd, and are tested with it
STARTING = {"init", "init_hash", "init_fresh", "init_decoder", "from_init"}  # need weights, and are tested with them


@pytest.fixture(scope="module")
def begun(image_folder, tmp_path_factory):
    """The configuration of a run that was stopped after step 2 of 4."""
    out = tmp_path_factory.mktemp("begun") / "run"
    fields = TINY_FIELDS | {
        "num_workers": 0,
        "mask_ratio": 0.75,  # fits what the table above changes
        "batch_size": 8,
        "blr": 3e-3,
        "steps": 4,
        "flip": False,
        "held_out": 0,
        "shard_window": 0,
    }
    config = recipes.folder(image_folder, str(out), **fields)

    def stop(report):
        if report.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert dmjd.pretrain(config, hooks=[stop]).step == 2
    return config


def test_every_setting_is_tried():
    tables = {*OTHER, *LENGTHS, *TOGETHER, *ALLOWED, *ELSEWHERE, *WSD, *STARTING}
    assert tables == {field.name for field in dataclasses.fields(PretrainConfig)}
    may_change = {field.name for field in dataclasses.fields(PretrainConfig) if field.metadata["resume"]}
    assert may_change == {*ALLOWED, *ELSEWHERE, *DURATIONS}


def content_of(config) -> dict:
    return {file: file.read_bytes() for file in Path(config.out).rglob("*") if file.is_file()}


@pytest.mark.parametrize("changes", [{name: OTHER[name]} for name in OTHER] + [TOGETHER], ids="-".join)
def test_a_setting_that_must_stay_is_named_with_both_values(begun, changes):
    changed, before = begun.replace(**changes), content_of(begun)
    with pytest.raises(ValueError, match="holds a run with other settings; use them, or another --out:") as error:
        dmjd.pretrain(changed)
    for name in changes:
        old, new = getattr(begun, name), getattr(changed, name)
        assert f"\n  {name}: {old} -> {new}" in str(error.value)
    assert content_of(begun) == before


@pytest.mark.parametrize("unit", LENGTHS)
def test_another_unit_or_a_shorter_run_says_how_to_go_on(begun, unit):
    """The flag and the value of the run, to be copied, and what makes it longer: one line."""
    before = content_of(begun)
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        dmjd.pretrain(begun.replace(**{unit: LENGTHS[unit]}))
    line = f"length: --steps 4 -> --{unit} {LENGTHS[unit]} (go on with --steps 4, or more steps for a longer run)"
    assert str(error.value).splitlines()[1:] == [f"  {line}"]
    assert content_of(begun) == before


def test_many_differing_settings_are_counted(begun):
    with pytest.raises(ValueError, match="and 2 more"):
        dmjd.pretrain(begun.replace(seed=1, flip=True, theta=0.5, blr=1, batch_size=4, warmup=0, hog_bins=8, mim=False))


def test_settings_that_may_change_take_effect(begun, tmp_path):
    shutil.copytree(begun.out, out := tmp_path / "run")
    result = dmjd.pretrain(begun.replace(out=str(out), **ALLOWED))
    assert (out / "report.html").exists()
    assert result.step == 6
    steps = [line["step"] for line in metrics(out) if "loss" in line]
    assert {1, 2, 4, 6} <= set(steps)  # besides those that were shown meanwhile
    assert steps == sorted(set(steps))
    assert [line["step"] for line in metrics(out) if "effective_rank" in line] == [3, 6]
    assert sorted(file.name for file in (out / "checkpoints").iterdir()) == [
        "final.safetensors",
        "step-000000002.safetensors",
        "step-000000005.safetensors",
    ]
    assert sorted(file.stem for file in (out / "figures").glob("step-*")) == ["step-000000003"]
    stored = PretrainConfig.from_json((out / "config.json").read_text(), "config.json")
    assert all(getattr(stored, name) == value for name, value in ALLOWED.items())


def test_the_images_may_move(begun, tmp_path):
    shutil.copytree(begun.out, out := tmp_path / "run")
    shutil.copytree(begun.out, still := tmp_path / "still")
    shutil.copytree(begun.data, data := tmp_path / "elsewhere")
    assert dmjd.pretrain(begun.replace(out=str(out), data=str(data))).finished
    assert dmjd.pretrain(begun.replace(out=str(still))).finished
    assert_same_bits(out, still)
    assert PretrainConfig.from_json((out / "config.json").read_text(), "config.json").data == str(data)


def _changed(data):
    next(data.rglob("00.png")).write_bytes(next(data.rglob("02.png")).read_bytes())


def _same_size(data):
    file = next(data.rglob("00.png"))
    file.write_bytes(b"#" + file.read_bytes()[1:-1] + b"#")


def _emptied(data):
    for file in data.rglob("*.png"):
        file.unlink()


def _without_checkpoint(data):
    shutil.rmtree(data.parent / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed, r"elsewhere: of 24 images compared, 1 differ from those this run began with, .*00\.png for one; .*"),
        (_same_size, r"of 24 images compared, 1 differ from those"),
        (_emptied, r"of 24 images compared, 24 differ from those .*; give --data .*, or another --out"),
        (shutil.rmtree, "there is no .*elsewhere"),
        (_without_checkpoint, "no checkpoint yet that its images could be compared with; give the same path"),
    ],
)
def test_other_images_at_another_path_are_refused(begun, tmp_path, change, message):
    shutil.copytree(begun.out, tmp_path / "run")
    shutil.copytree(begun.data, data := tmp_path / "elsewhere")
    change(data)
    config = begun.replace(out=str(tmp_path / "run"), data=str(data))
    before = content_of(config)
    with pytest.raises(ValueError, match=message) as error:
        dmjd.pretrain(config)
    assert "\n" not in str(error.value)
    assert content_of(config) == before
