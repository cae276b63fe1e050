"""Runs: they learn, resume bit for bit after any interruption, stop cleanly, and survive unreadable images."""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import TINY, TINY_FIELDS, assert_same_bits, dmjd, metrics

import dmjd as package
from dmjd.config import recipes
from dmjd.encoders.weights import encoder_bytes
from dmjd.engine.device import make_fabric, seed_device
from dmjd.engine.loop import Duration, Engine, NonFiniteLoss, StopSignal, Task
from dmjd.engine.optim import adamw, scaled_learning_rate, warmup_cosine
from dmjd.runs.build import build_masks, build_model


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dmjd", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(m["step"] >= step for m in metrics(run)[:-1]):  # the last line may be half written
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step} in time: {process.communicate()[1]}")


def test_a_run_learns_and_leaves_everything_behind(tmp_path, image_folder):
    run = tmp_path / "run"
    result = package.pretrain(recipes.folder(image_folder, str(run), steps=30, batch_size=8, blr=0.02, **TINY_FIELDS))
    assert result.finished
    assert result.step == 30
    losses = [m["loss"] for m in metrics(run)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    names = {p.name for p in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "encoder.safetensors", "figures", "files.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    encoder = package.load_encoder(run)
    assert not encoder.training
    tokens = encoder(encoder.preprocess(str(next(image_folder.rglob("*.png")))))
    assert tokens.shape == (1, 16, 32)
    again = package.load_encoder(run / "checkpoints" / "final.safetensors")
    assert encoder_bytes(again) == encoder_bytes(encoder)
    # A finished run started again says so and changes nothing.
    before = (run / "encoder.safetensors").stat().st_mtime_ns
    result = package.pretrain(recipes.folder(image_folder, str(run), steps=30, batch_size=8, blr=0.02, **TINY_FIELDS))
    assert result.finished
    assert (run / "encoder.safetensors").stat().st_mtime_ns == before


RESUME = [*TINY, "--steps", 14, "--checkpoint-every", 5, "--batch-size", 10, "--drop-path", 0.3]


@pytest.mark.parametrize(
    "flags",
    [["--num-workers", 2, "--accumulate", 2], ["--num-workers", 0], ["--num-workers", 0, "--optimizer", "muon"]],
    ids=["workers-accumulate", "plain", "muon"],
)
def test_kill_and_resume_equals_a_straight_run_bit_for_bit(tmp_path, image_folder, flags):
    """Killed between checkpoints, mid-epoch (24 images, batches of 10); resumed with another number of workers."""
    common = ["pretrain", "folder", "--data", image_folder, *RESUME, *flags]
    dmjd(*common, "--out", tmp_path / "straight")
    process = start(*common, "--out", tmp_path / "killed")
    wait_for_step(tmp_path / "killed", 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoints" / "final.safetensors").exists(), "the kill came too late"
    resumed = dmjd(*common, "--num-workers", 1, "--out", tmp_path / "killed")
    assert "resumed at step" in resumed.stderr
    assert_same_bits(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_cleanly(tmp_path, number):
    common = ["pretrain", "digits", *TINY, "--steps", 100000, "--batch-size", 32, "--out", tmp_path / "run"]
    process = start(*common)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "the same command goes on from there" in stderr
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:09d}.safetensors").exists()


def test_minutes_and_a_longer_duration(tmp_path):
    fields = TINY_FIELDS | {"batch_size": 16, "out": str(tmp_path / "run")}
    assert package.pretrain(recipes.digits(minutes=0.02, **fields)).finished
    first = metrics(tmp_path / "run")
    assert all(m["seconds"] < 1.2 for m in first[:-1])
    assert first[-1]["seconds"] >= 1.2
    assert package.pretrain(recipes.digits(minutes=0.04, **fields)).finished
    both = metrics(tmp_path / "run")
    assert both[: len(first)] == first
    assert both[-1]["seconds"] >= 2.4
    # The schedule follows the clock: each step's rate is that of the share of the minutes gone by before it.
    config = recipes.digits(minutes=0.04, **fields)
    peak = scaled_learning_rate(config.blr, 16, build_masks(config))
    for before, after in pairwise(both[len(first) - 1 :]):
        assert after["lr"] == pytest.approx(peak * warmup_cosine(before["seconds"] / 2.4, config.warmup), abs=1e-9)


def test_a_damaged_newest_checkpoint_falls_back(tmp_path, image_folder):
    common = ["pretrain", "folder", "--data", image_folder, *TINY, "--batch-size", 8, "--checkpoint-every", 3]
    dmjd(*common, "--steps", 8, "--out", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "final.safetensors").unlink()
    newest = checkpoints / "step-000000006.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    resumed = dmjd(*common, "--steps", 8, "--out", tmp_path / "run")
    assert "not a readable checkpoint" in resumed.stderr
    assert "resumed at step 3" in resumed.stderr
    dmjd(*common, "--steps", 8, "--out", tmp_path / "straight")
    assert_same_bits(tmp_path / "run", tmp_path / "straight")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    common = ["pretrain", "digits", *TINY, "--steps", 100000, "--batch-size", 32, "--out", tmp_path / "run"]
    process = start(*common)
    try:
        wait_for_step(tmp_path / "run", 2, process)
        second = dmjd(*common, check=False)
        assert second.returncode == 2
        assert "another process is training" in second.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_bad_images_are_replaced_counted_and_named_once(tmp_path, image_folder):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    (data / "text.jpg").write_text("no image")
    (data / "empty.png").write_bytes(b"")
    run = tmp_path / "run"
    result = dmjd("pretrain", "folder", "--data", data, "--out", run, *TINY, "--steps", 12, "--batch-size", 13)
    assert result.stderr.count("text.jpg") == 1
    assert "2 unreadable image(s)" in result.stderr
    assert sorted(Path(line.split("\t")[0]).name for line in (run / "unreadable.txt").read_text().splitlines()) == [
        "empty.png",
        "text.jpg",
    ]
    strict = dmjd(
        *(
            "pretrain",
            "folder",
            "--data",
            data,
            "--out",
            tmp_path / "strict",
            *TINY,
            "--steps",
            12,
            "--max-unreadable",
            1,
        ),
        check=False,
    )
    assert strict.returncode == 2
    assert "text.jpg" in strict.stderr


def test_one_image_trains_with_a_warning(tmp_path, image_folder):
    data = tmp_path / "one"
    data.mkdir()
    shutil.copy(next(image_folder.rglob("*.png")), data)
    result = dmjd("pretrain", "folder", "--data", data, "--out", tmp_path / "run", *TINY, "--steps", 3)
    assert "only 1 image(s)" in result.stderr
    assert "--batch-size 64 is more than there are: 1 a step" in result.stderr  # the recipe's own


def test_images_smaller_than_the_input_are_named(tmp_path, image_folder):
    """CIFAR at 224 pixels is the costly mistake of one who leaves --img-size out."""
    rest = [*TINY, "--steps", 1, "--no-final-eval"]
    result = dmjd("pretrain", "folder", "--data", image_folder, "--out", tmp_path / "as_they_are", *rest)
    assert "enlarged" not in result.stderr
    result = dmjd("pretrain", "folder", "--data", image_folder, "--out", tmp_path / "large", *rest, "--img-size", 256)
    assert "to 256 x 256: a step works on" in result.stderr


class _Explodes(Task):
    """Its loss becomes infinite at a given step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 3))
        self.at, self.calls = at, 0

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"loss": (self.weight * batch).sum() * (float("nan") if self.calls == self.at else 1.0)}


@pytest.mark.parametrize("eager", [True, False], ids=["host", "device"])
def test_a_non_finite_loss_stops_before_the_step(eager):
    """On accelerators the update is skipped on the device and found when a line of metrics is due."""
    fabric = make_fabric("cpu", "fp32")
    task = _Explodes(at=4)
    engine = Engine(fabric, task, adamw(task, 0.0), Duration(steps=10), 0.1, lambda share: 1.0, 1, log_every=6)
    engine._eager = eager
    seen = {}

    def keep(report) -> None:
        seen[report.state.step] = task.weight.detach().clone()

    with pytest.raises(NonFiniteLoss, match="at step 4"), StopSignal() as stop:
        engine.run(iter(lambda: torch.ones(3, 3), None), [keep], stop)
    assert torch.equal(task.weight, seen[3])
    assert not torch.equal(seen[2], seen[3])
    assert engine.state.step == (3 if eager else 6)


def test_the_seed_alone_decides_the_weights():
    first, second = (encoder_bytes(build_model(recipes.digits(**TINY_FIELDS)).encoder) for _ in range(2))
    assert first == second
    assert encoder_bytes(build_model(recipes.digits(**TINY_FIELDS, seed=1)).encoder) != first


def test_a_step_is_seeded_as_by_torch():
    seed_device(torch.device("cpu"), 2**63 - 1)
    drawn = torch.rand(5)
    torch.manual_seed(2**63 - 1)
    assert torch.equal(drawn, torch.rand(5))
