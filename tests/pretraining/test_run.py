"""Pre-training learns, resumes bit for bit after interruptions, stops cleanly, and tolerates unreadable images."""

import os
import shutil
import signal
import time
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
import torch
from support import TINY, TINY_FIELDS, assert_same_bits, metrics, mistake

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.encoders.stored import encoder_bytes
from dmjd.engine.optim import scaled_learning_rate, warmup_cosine
from dmjd.pretraining.batch_size import resolve_batch_size
from dmjd.runs.build import build_masks


def command(*arguments: object) -> None:
    """``dmjd pretrain folder ...`` in this process."""
    assert main(["pretrain", "folder", *map(str, arguments)]) == 0


def start(log: Path, *arguments: object) -> BaseProcess:
    """Start ``dmjd ...`` in a process of its own."""
    return forked.start(main, [str(argument) for argument in arguments], log=log)


def wait_for_step(run: Path, step: int, process: BaseProcess, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if any(m["step"] >= step for m in metrics(run)[:-1]):  # the last line may be incomplete
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no step {step} in time: {log.read_text()}")


def test_a_run_learns_and_leaves_its_files(tmp_path, image_folder):
    run = tmp_path / "run"
    result = dmjd.pretrain(recipes.folder(image_folder, str(run), steps=30, batch_size=8, blr=0.02, **TINY_FIELDS))
    assert result.finished
    assert result.step == 30
    assert result.metrics == metrics(run)[-1]
    losses = [m["loss"] for m in metrics(run)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    names = {p.name for p in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "encoder.safetensors", "figures", "files.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    encoder = dmjd.load_encoder(run)
    assert not encoder.training
    tokens = encoder(encoder.preprocess(str(next(image_folder.rglob("*.png")))))
    assert tokens.shape == (1, 16, 32)
    again = dmjd.load_encoder(run / "checkpoints" / "final.safetensors")
    assert encoder_bytes(again) == encoder_bytes(encoder)
    # Starting a finished run again changes nothing.
    before = (run / "encoder.safetensors").stat().st_mtime_ns
    result = dmjd.pretrain(recipes.folder(image_folder, str(run), steps=30, batch_size=8, blr=0.02, **TINY_FIELDS))
    assert result.finished
    assert (run / "encoder.safetensors").stat().st_mtime_ns == before


def test_a_killed_process_resumes_to_the_same_bits(capsys, tmp_path, image_folder):
    """Killed between checkpoints, mid-epoch (24 images, batches of 10); resumed with another number of workers."""
    flags = ["--data", image_folder, *TINY, "--steps", 14, "--checkpoint-every", 5, "--batch-size", 10]
    flags += ["--drop-path", 0.3, "--accumulate", 2]
    command(*flags, "--num-workers", 2, "--out", tmp_path / "straight")
    log = tmp_path / "log"
    process = start(log, "pretrain", "folder", *flags, "--num-workers", 2, "--out", tmp_path / "killed")
    wait_for_step(tmp_path / "killed", 7, process, log)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "checkpoints" / "final.safetensors").exists(), "the kill came too late"
    capsys.readouterr()
    command(*flags, "--num-workers", 1, "--out", tmp_path / "killed")
    assert "resumed at step" in capsys.readouterr().err
    assert_same_bits(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_crash_resumes_to_the_same_bits(capsys, tmp_path, image_folder, optimizer):
    settings = {"steps": 14, "checkpoint_every": 5, "batch_size": 10, "drop_path": 0.3, "num_workers": 0}
    config = recipes.folder(image_folder, **settings, optimizer=optimizer, **TINY_FIELDS)

    def crash(report):
        if report.state.step == 8:
            raise RuntimeError("crash")

    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    dmjd.pretrain(config.replace(out=str(straight)))
    with pytest.raises(RuntimeError, match="crash"):
        dmjd.pretrain(config.replace(out=str(crashed)), hooks=[crash])
    assert dmjd.pretrain(config.replace(out=str(crashed))).finished
    printed = capsys.readouterr().err
    assert "an error ended the run after step 8, whose state is saved" in printed
    assert "resumed at step 8" in printed
    assert_same_bits(straight, crashed)


def test_sigint_saves_and_stops(capsys, tmp_path):
    def interrupt(report):
        if report.state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    config = recipes.digits(out=str(tmp_path / "run"), steps=100000, batch_size=32, **TINY_FIELDS)
    result = dmjd.pretrain(config, hooks=[interrupt])
    assert not result.finished
    assert "the same command resumes from there" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / f"step-{result.step:09d}.safetensors").exists()


def test_a_second_run_in_the_folder_is_refused_and_sigterm_ends_the_first_cleanly(capsys, tmp_path):
    arguments = ["pretrain", "digits", *TINY, "--steps", 100000, "--batch-size", 32, "--out", tmp_path / "run"]
    process = start(log := tmp_path / "log", *arguments)
    wait_for_step(tmp_path / "run", 5, process, log)
    assert "another process is training" in mistake(capsys, *arguments)
    assert process.is_alive()
    process.terminate()
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert "the same command resumes from there" in log.read_text()
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:09d}.safetensors").exists()


def test_minutes_and_a_longer_duration(tmp_path):
    fields = TINY_FIELDS | {"batch_size": 16, "out": str(tmp_path / "run")}
    assert dmjd.pretrain(recipes.digits(minutes=0.02, **fields)).finished
    first = metrics(tmp_path / "run")
    assert all(m["seconds"] < 1.2 for m in first[:-1])
    assert first[-1]["seconds"] >= 1.2
    assert dmjd.pretrain(recipes.digits(minutes=0.04, **fields)).finished
    both = metrics(tmp_path / "run")
    assert both[: len(first)] == first
    assert both[-1]["seconds"] >= 2.4
    # The schedule follows the clock: the learning rate of a step depends on the time before it.
    config = recipes.digits(minutes=0.04, **fields)
    peak = scaled_learning_rate(config.blr, 16, build_masks(config))
    for before, after in pairwise(both[len(first) - 1 :]):
        assert after["lr"] == pytest.approx(peak * warmup_cosine(before["seconds"] / 2.4, config.warmup), abs=1e-9)


def test_a_damaged_newest_checkpoint_falls_back(capsys, tmp_path, image_folder):
    flags = ["--data", image_folder, *TINY, "--steps", 8, "--batch-size", 8, "--checkpoint-every", 3]
    flags += ["--num-workers", 0]
    command(*flags, "--out", tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "final.safetensors").unlink()
    newest = checkpoints / "step-000000006.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    command(*flags, "--out", tmp_path / "run")
    printed = capsys.readouterr().err
    assert "not a readable checkpoint" in printed
    assert "resumed at step 3" in printed
    assert_same_bits(tmp_path / "run", tmp_path / "straight")


def test_unreadable_images_are_replaced_counted_and_named_once(capsys, tmp_path, image_folder):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    (data / "text.jpg").write_text("no image")
    (data / "empty.png").write_bytes(b"")
    flags = ["--data", data, *TINY, "--steps", 6, "--num-workers", 0, "--batch-size", 13]
    run = tmp_path / "run"
    command(*flags, "--out", run)
    printed = capsys.readouterr().err
    assert printed.count("text.jpg") == 1
    assert "2 unreadable image(s)" in printed
    names = [Path(line.split("\t")[0]).name for line in (run / "unreadable.txt").read_text().splitlines()]
    assert sorted(names) == ["empty.png", "text.jpg"]
    strict = [*flags, "--out", tmp_path / "strict", "--max-unreadable", 1]
    assert main(["pretrain", "folder", *map(str, strict)]) == 2
    assert "more than --max-unreadable = 1" in capsys.readouterr().err


def test_one_image_trains_with_a_warning(capsys, tmp_path, image_folder):
    data = tmp_path / "one"
    data.mkdir()
    shutil.copy(next(image_folder.rglob("*.png")), data)
    command("--data", data, "--out", tmp_path / "run", *TINY, "--steps", 3, "--num-workers", 0, "--batch-size", 64)
    printed = capsys.readouterr().err
    assert "only 1 image(s)" in printed
    assert "batch size 64 (the recipe's unless you gave one) exceeds the number of images: 1 per step" in printed


def test_batch_sizes_that_cannot_be_divided():
    config, cpu = recipes.digits(**TINY_FIELDS | {"batch_size": 6, "accumulate": 2}), torch.device("cpu")
    assert resolve_batch_size(config, 5, 1, cpu) == (config, 4)
    with pytest.raises(
        ValueError, match=r"^1 image\(s\) cannot be divided among 2 process\(es\) x --accumulate 2; use"
    ):
        resolve_batch_size(config, 1, 2, cpu)
    with pytest.raises(ValueError, match=r"batch size 6 .* give a new run a --batch-size that is a multiple of 4"):
        resolve_batch_size(config, 9, 2, cpu)


def test_images_smaller_than_the_input_are_named(capsys, tmp_path, image_folder):
    """Without --img-size, CIFAR images would be enlarged to 224 pixels, a costly mistake."""
    flags = ["--data", image_folder, *TINY, "--steps", 1, "--batch-size", 2, "--num-workers", 0]
    command(*flags, "--out", tmp_path / "as_they_are")
    assert "enlarged" not in capsys.readouterr().err
    flags[flags.index("--img-size") + 1] = 192
    command(*flags, "--out", tmp_path / "large")
    assert "to 192 x 192: a step works on" in capsys.readouterr().err
