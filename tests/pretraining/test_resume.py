"""Resuming with other settings: each is refused by name before anything is read, or allowed and takes effect."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
from support import TINY_FIELDS, metrics

import dmjd
from dmjd.config import recipes
from dmjd.config.pretrain import DURATIONS, PretrainConfig

# Another value of every setting that a run must keep, except those of the next two tables.
OTHER = {
    "recipe": "fast",
    "data": "a folder that does not exist",
    "labels": "folder",
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
    "teacher_layers": 2,
    "teacher_skip": 1,
    "teacher_size": 16,
    "ema_layers": 1,
    "ema_momentum": 0.9,
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
    "batch_size": 4,
    "accumulate": 2,
    "blr": 1e-3,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "warmup": 0.5,
    "layer_decay": 0.5,
    "init_freeze": 0.5,
    "clip_grad": 1,
    "seed": 1,
    "precision": "bf16",
    "compile": True,
    "steps": 3,  # shorter
    "epochs": 100,
    "minutes": 5,
}
TOGETHER = {"mean": (0.1,) * 3, "std": (0.1,) * 3}

# Settings that may change, with values whose effect is tested.
ALLOWED = {
    "steps": 6,
    "num_workers": 1,
    "max_unreadable": 0,
    "device": "auto",
    "grad_checkpointing": True,
    "checkpoint_every": 5,
    "log_every": 2,
    "eval_every": 3,
    "final_eval": True,
}
ELSEWHERE = {"out", "resume", "wandb", "test_data", "teacher"}  # may change too, and have tests of their own
START = {"init", "init_hash", "init_fresh", "init_decoder"}  # see tests/runs/test_start.py


@pytest.fixture(scope="module")
def begun(image_folder, tmp_path_factory):
    """The configuration of a run that was stopped after step 2 of 4."""
    out = tmp_path_factory.mktemp("begun") / "run"
    fields = TINY_FIELDS | {"num_workers": 0, "batch_size": 8, "steps": 4, "flip": False}
    config = recipes.folder(image_folder, str(out), **fields)

    def stop(report):
        if report.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert dmjd.pretrain(config, hooks=[stop]).step == 2
    return config


def test_every_setting_is_tried():
    tables = {*OTHER, *TOGETHER, *ALLOWED, *ELSEWHERE, *START}
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


def test_many_differing_settings_are_counted(begun):
    with pytest.raises(ValueError, match="and 2 more"):
        dmjd.pretrain(begun.replace(seed=1, flip=True, theta=0.5, blr=1, batch_size=4, warmup=0, hog_bins=8, mim=False))


def test_settings_that_may_change_take_effect(begun, tmp_path):
    shutil.copytree(begun.out, out := tmp_path / "run")
    result = dmjd.pretrain(begun.replace(out=str(out), **ALLOWED))
    assert result.step == 6
    assert [line["step"] for line in metrics(out)] == [1, 2, 4, 6]
    assert sorted(file.name for file in (out / "checkpoints").iterdir()) == [
        "final.safetensors",
        "step-000000002.safetensors",
        "step-000000005.safetensors",
    ]
    assert sorted(file.stem for file in (out / "figures").glob("step-*")) == ["step-000000003"]
    stored = PretrainConfig.from_json((out / "config.json").read_text(), "config.json")
    assert all(getattr(stored, name) == value for name, value in ALLOWED.items())
