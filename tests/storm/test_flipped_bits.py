"""One random bit is flipped in every file that a run keeps: it is noticed, or it changes nothing but a log."""

import shutil
import signal
from pathlib import Path

import pytest
import state_files
from forked import killed_before, run
from safetensors.torch import load_file
from state_files import COMMANDS, FILES, READ, TRAIN, Command, judge, make_base
from storm.table import record

from dmjd.cli.main import main

STARTED = [*TRAIN, "--eval-every", 2]
TUNE = ["--steps", 4, "--batch-size", 8, "--checkpoint-every", 1, "--eval-every", 1]
BITS = 2  # for each file and command

_STEP = "step-000000003.safetensors"


def _started(root: Path) -> list[object]:
    """A run that began from weights, on images one of which is unreadable."""
    command = ["pretrain", "folder", "--data", root / "more", "--out", root / "started"]
    return [*command, *STARTED, "--init", root / "run" / "encoder.safetensors"]


def _weights(root: Path) -> dict[str, list]:
    tensors = load_file(root / "started" / "checkpoints" / "final.safetensors")
    return {key: value.tolist() for key, value in tensors.items()}


MORE = {
    "started": Command(
        lambda root: [*_started(root), "--steps", 6],
        _weights,
    ),
    "tuned": Command(
        lambda root: ["evaluate", "finetune", root / "started", *READ, *TUNE],
        lambda root: (root / "started" / "evaluation" / "finetune" / "classifier.safetensors").read_bytes(),
    ),
}

# Besides those of FILES: files of a run that began from weights, and of a fine-tuning that was killed.
MORE_FILES = {
    "started/start_features.safetensors": ("started",),
    "started/initialization.json": ("started",),
    "started/unreadable.txt": ("started",),
    "started/metrics.jsonl": ("started",),
    "started/config.json": ("started", "tuned"),
    "started/evaluation/finetune/pre-trained*/config.json": ("tuned",),
    "started/evaluation/finetune/pre-trained*/checkpoints/step-000000002.safetensors": ("tuned",),
}


def _make_more(root: Path, log: Path) -> None:
    shutil.copytree(root / "data", root / "more")
    (root / "more" / "train" / "dark" / "damaged.png").write_bytes(b"no image")
    assert main([str(word) for word in _started(root)]) == 0
    words = [str(word) for word in MORE["tuned"].arguments(root)]
    assert run(killed_before, _STEP, words, log=log, seconds=300) == -signal.SIGKILL, log.read_text()


@pytest.mark.slow
def test_flipped_bits(tmp_path, capsys, monkeypatch):
    work, base = tmp_path / "work", tmp_path / "base"
    monkeypatch.setattr(state_files, "COMMANDS", COMMANDS | MORE)
    make_base(work)
    _make_more(work, tmp_path / "log")
    shutil.copytree(work, base)
    cases = [(name, file) for file, names in (FILES | MORE_FILES).items() for name in names] * BITS
    expected, lost = {}, []
    for seed, (name, file) in enumerate(cases):
        if name not in expected:
            shutil.rmtree(work)
            shutil.copytree(base, work)
            assert (COMMANDS | MORE)[name].run(work) == 0
            expected[name] = (COMMANDS | MORE)[name].outcome(work)
        found = judge(base, work, (name, file, "flip"), seed, capsys, expected[name])
        if found.problems:
            lost.append((seed, name, file, found.problems, found.printed[-400:]))
    record("flipped bits in state files", tried=len(cases), lost=len(lost))
    assert not lost, "\n".join(map(str, lost))
