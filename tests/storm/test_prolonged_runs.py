"""Runs with the schedule wsd that are stopped and prolonged in many ways end with the bits of the straight run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support import TINY_FIELDS, assert_same_bits, metrics
from support import dmjd as command

import dmjd
from dmjd.config import recipes
from dmjd.encoders.weights import load_encoder

pytestmark = pytest.mark.slow

WSD = {"schedule": "wsd", "warmup_steps": 1, "num_workers": 0, "batch_size": 8, "flip": False, "checkpoint_every": 3}


def config_of(data, out, **fields):
    return recipes.folder(data, str(out), **TINY_FIELDS | WSD | fields)


def stop_at(step: int):
    """A hook that stops a run after a step; the signal that hooks send is heard in the next one."""

    def stop(report):
        if report.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@pytest.fixture(scope="module")
def straight(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert dmjd.pretrain(config_of(image_folder, out, steps=20)).finished
    return out


@pytest.mark.parametrize("at", [*range(2, 10), *range(12, 20)], ids="stopped at {}".format)
def test_stops_before_and_after_change_nothing(image_folder, straight, tmp_path, at):
    """Also in the cooldown that is left, and in the one that stays."""
    out = tmp_path / "run"
    first = dmjd.pretrain(config_of(image_folder, out, steps=10), hooks=[stop_at(at)])
    assert first.finished == (at > 10)
    if at > 10:
        assert not dmjd.pretrain(config_of(image_folder, out, steps=20), hooks=[stop_at(at)]).finished
    assert dmjd.pretrain(config_of(image_folder, out, steps=20)).finished
    assert_same_bits(out, straight)
    assert (out / "branches" / "step-8" / "encoder.safetensors").exists() == (at > 8)


@pytest.mark.parametrize(
    "fields",
    [
        {"lengths": ("steps", 5, 10, 23)},
        {"lengths": ("epochs", 1, 3, 6), "optimizer": "muon"},
        {"lengths": ("steps", 7, 13), "accumulate": 2, "num_workers": 2, "cooldown": 0.35},
        {"lengths": ("steps", 6, 11), "vis_target": "ema", "drop_path": 0.2, "checkpoint_every": 2},
    ],
    ids=["twice", "epochs twice, muon", "accumulate, workers", "ema"],
)
def test_it_may_be_prolonged_again_and_in_other_ways(image_folder, tmp_path, fields):
    unit, *lengths = fields.pop("lengths")
    for length in lengths:
        assert dmjd.pretrain(config_of(image_folder, tmp_path / "run", **fields | {unit: length})).finished
    assert dmjd.pretrain(config_of(image_folder, tmp_path / "straight", **fields | {unit: lengths[-1]})).finished
    assert_same_bits(tmp_path / "run", tmp_path / "straight")
    assert len(list((tmp_path / "run" / "branches").iterdir())) == len(lengths) - 1


def test_the_command_asks_the_process_that_trains(image_folder, tmp_path):
    out = tmp_path / "run"
    config = config_of(image_folder, out, steps=100_000, log_every=20)
    code = (
        "import sys, dmjd; from dmjd.config.pretrain import PretrainConfig\n"
        "dmjd.pretrain(PretrainConfig.from_json(sys.argv[1]))"
    )
    run = subprocess.Popen([sys.executable, "-c", code, config.to_json()], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: any(line["step"] >= 20 for line in metrics(out)), run)
        asked = command("pretrain", "--out", out, "--cooldown-now")
        assert f"asked process {run.pid}, which trains in {out}" in asked.stderr
        wait_for(lambda: list(out.glob("branches/step-*/figures/curves.png")), run)
        (branch,) = (out / "branches").iterdir()
        began = int(branch.name.removeprefix("step-"))
        wait_for(lambda: metrics(out)[-1]["step"] > began + 20, run)
    finally:
        run.send_signal(signal.SIGTERM)
        _, printed = run.communicate(timeout=60)
    assert run.returncode == 0, printed
    assert f"the run goes on from step {began}" in printed
    assert load_encoder(branch).preprocess is not None


def wait_for(condition, run: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
