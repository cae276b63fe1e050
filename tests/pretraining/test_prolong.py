"""A run with the schedule wsd that is prolonged equals one that was meant to be longer, and keeps what it had."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from support import TINY_FIELDS, assert_same_bits, metrics

import dmjd
from dmjd.config import recipes
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.weights import load_encoder

WSD = {"schedule": "wsd", "warmup_steps": 3, "num_workers": 0, "batch_size": 8, "flip": False}
STABLE = "before-cooldown.safetensors"


def config_of(data, out, **fields) -> PretrainConfig:
    return recipes.folder(data, str(out), **TINY_FIELDS | WSD | fields)


def stop_at(step: int):
    """A hook that stops a run after a step; the signal that hooks send is heard in the next one."""

    def stop(report):
        if report.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def checkpoints(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert dmjd.pretrain(config_of(image_folder, out, steps=20)).finished
    return out


@pytest.fixture(scope="module")
def short(image_folder, tmp_path_factory):
    """A finished run of 10 steps; to be copied."""
    out = tmp_path_factory.mktemp("short") / "run"
    assert dmjd.pretrain(config_of(image_folder, out, steps=10)).finished
    return out


def test_the_learning_rate_rises_stays_and_falls_as_one_minus_a_root(straight):
    lrs = [line["lr"] for line in metrics(straight)]
    peak = max(lrs)
    assert [lr / peak for lr in lrs[:4]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert lrs[3:17] == [peak] * 14
    assert [lr / peak for lr in lrs[16:]] == pytest.approx([1 - (share / 4) ** 0.5 for share in range(4)])


def test_a_prolonged_run_equals_the_longer_one_and_keeps_its_first_end(image_folder, short, straight, tmp_path, capsys):
    shutil.copytree(short, out := tmp_path / "run")
    had = {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (out / "evaluation").mkdir()
    (out / "evaluation" / "mine.txt").write_text("kept")
    assert checkpoints(out) == [STABLE, "final.safetensors"]
    assert dmjd.pretrain(config_of(image_folder, out, steps=20)).step == 20
    said = capsys.readouterr().err
    assert "the run is prolonged from step 8" in said
    assert "was missing" not in said
    assert_same_bits(out, straight)
    branch = out / "branches" / "step-8"
    for name in ("encoder.safetensors", "metrics.jsonl", "checkpoints/final.safetensors", "figures/final.png"):
        assert (branch / name).read_bytes() == had[Path(name)], name
    assert (branch / "evaluation" / "mine.txt").read_text() == "kept"
    assert checkpoints(branch) == ["final.safetensors"]
    stored = PretrainConfig.from_json((branch / "config.json").read_text())
    assert (stored.steps, stored.out) == (10, str(branch))
    assert dmjd.pretrain(stored).finished  # a finished run as any other
    assert checkpoints(out) == [STABLE, "final.safetensors"]
    assert [path.name for path in (out / "branches").iterdir()] == ["step-8"]
    load_encoder(out)
    load_encoder(branch)


def test_a_stop_in_a_cooldown_that_is_left_changes_nothing(image_folder, straight, tmp_path):
    """The unfinished cooldown is kept."""
    out = tmp_path / "run"
    assert not dmjd.pretrain(config_of(image_folder, out, steps=10), hooks=[stop_at(9)]).finished
    assert checkpoints(out) == [STABLE, "step-000000009.safetensors"]
    assert dmjd.pretrain(config_of(image_folder, out, steps=20)).finished
    assert_same_bits(out, straight)
    assert checkpoints(out / "branches" / "step-8") == ["step-000000009.safetensors"]


def test_a_stop_at_the_last_step_before_the_cooldown_keeps_that_state(image_folder, straight, tmp_path):
    out = tmp_path / "run"
    assert not dmjd.pretrain(config_of(image_folder, out, steps=10), hooks=[stop_at(8)]).finished
    assert checkpoints(out) == [STABLE]
    shutil.copytree(out, other := tmp_path / "other")
    assert dmjd.pretrain(config_of(image_folder, out, steps=20)).finished
    assert_same_bits(out, straight)
    assert not (out / "branches").exists()  # there is no cooldown to keep
    assert dmjd.pretrain(config_of(image_folder, other, steps=10)).finished
    assert dmjd.pretrain(config_of(image_folder, other, steps=20)).finished
    assert_same_bits(other, straight)


@pytest.mark.slow
def test_epochs_muon_a_moving_target_parts_and_workers_prolonged_twice(image_folder, tmp_path):
    fields = {"optimizer": "muon", "vis_target": "ema", "accumulate": 2, "num_workers": 1, "checkpoint_every": 2}
    for epochs in (2, 4, 7):
        assert dmjd.pretrain(config_of(image_folder, tmp_path / "run", epochs=epochs, **fields)).finished
    assert dmjd.pretrain(config_of(image_folder, tmp_path / "straight", epochs=7, **fields)).finished
    assert_same_bits(tmp_path / "run", tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "run" / "branches").iterdir()) == ["step-10", "step-5"]


@pytest.mark.slow
def test_minutes_go_on_before_the_cooldown(image_folder, tmp_path):
    out = tmp_path / "run"
    first = dmjd.pretrain(config_of(image_folder, out, minutes=0.02))
    assert first.finished
    kept = json.loads((out / "config.json").read_text())
    second = dmjd.pretrain(config_of(image_folder, out, minutes=0.03))
    (branch,) = (out / "branches").iterdir()
    began = int(branch.name.removeprefix("step-"))
    assert began < first.step < second.step
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, second.step + 1))
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert lines[began]["lr"] == max(line["lr"] for line in lines)
    assert [line for line in metrics(branch) if line["step"] <= began] == lines[:began]
    assert kept["minutes"] == json.loads((branch / "config.json").read_text())["minutes"] == 0.02


def test_without_its_state_before_the_cooldown_a_run_is_left_as_it_is(image_folder, short, tmp_path):
    shutil.copytree(short, out := tmp_path / "run")
    file = out / "checkpoints" / STABLE
    file.write_bytes(file.read_bytes()[:-1])
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(ValueError, match=r"that needs its state before .*Give --steps 10 as before"):
        dmjd.pretrain(config_of(image_folder, out, steps=20))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"} == before
    file.unlink()
    with pytest.raises(ValueError, match="it is missing, as in a branch"):
        dmjd.pretrain(config_of(image_folder, out, steps=20))
    assert dmjd.pretrain(config_of(image_folder, out, steps=10)).finished


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cooldown": 1.5}, "cooldown must"),
        ({"schedule": "cosine", "warmup_steps": None, "cooldown": 0.2}, "cooldown is for --schedule wsd"),
        ({"schedule": "cosine"}, "warmup_steps is for --schedule wsd; a cosine has --warmup"),
        ({"warmup": 0.1}, "warmup is a fraction of the run, .* give --warmup-steps instead"),
        ({"init_freeze": 0.1}, "init_freeze is a fraction of the run"),
        ({"warmup_steps": 9}, "the warm-up takes 9 steps .* begins at step 8: give --warmup-steps 1, or a longer run"),
        ({"steps": None, "epochs": 1, "warmup_steps": None}, "the warm-up takes 200 steps .* begins at step 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(image_folder, tmp_path, fields, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message) as error:
        dmjd.pretrain(config_of(image_folder, out, **{"steps": 10} | fields))
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_another_schedule_or_cooldown_is_refused_on_resume(image_folder, short):
    config = config_of(image_folder, short, steps=20)
    for changes in ({"schedule": "cosine", "warmup_steps": None}, {"cooldown": 0.5}, {"warmup_steps": 1}):
        with pytest.raises(ValueError, match="holds a run with other settings") as error:
            dmjd.pretrain(config.replace(**changes))
        name = next(iter(changes))
        assert f"\n  {name}: {getattr(config, name)} -> {changes[name]}" in str(error.value)
