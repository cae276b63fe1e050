"""Two commands at once on one run folder: none hangs, shows a traceback or loses anything; a second writer is told."""

import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from storm.table import record
from support import TINY

import dmjd
from dmjd.cli.main import main

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

SEED = 0

TOLD = "another process is"  # training in the folder, or writing the file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on labeled images."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for i in range(count):
            folder = root / "data" / split / ("dark", "light")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(127 * (i % 2))
            Image.fromarray(pixels).save(folder / f"{i}.png")
    process = start(training(root / "data", root / "run", 4))
    assert end(process) == (0, ""), process.args
    return root / "run"


def training(data: Path, out: Path, steps: int) -> list:
    flags = [*TINY, "--labels", "folder", "--batch-size", 8, "--num-workers", 0, "--checkpoint-every", 5]
    return ["pretrain", "folder", "--data", data, "--out", out, *flags, "--steps", steps]


def start(words: list) -> subprocess.Popen:
    command = [sys.executable, "-m", "dmjd", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and errors of a process; a hang is an error."""
    try:
        _, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{process.args} hangs: {process.communicate()[1]}") from None
    assert "Traceback" not in stderr, stderr
    return process.returncode, "\n".join(line for line in stderr.splitlines() if line.startswith("error"))


def commands(run: Path, data: Path) -> dict[str, list]:
    """Name -> command line."""
    finetune = ["evaluate", "finetune", run, "--batch-size", 8, "--device", "cpu", "--steps"]
    return {
        "pretrain": training(data, run, 60),
        "knn": ["evaluate", "knn", run, "--device", "cpu"],
        "linear": ["evaluate", "linear", run, "--epochs", 2, "--device", "cpu"],
        "finetune": [*finetune, 20],
        "other finetune": [*finetune, 15],
        "embed": ["embed", run, "--out", run / "features.npy", "--device", "cpu"],
        "show": ["show", "reconstructions", run, "--out", run / "figure.png"],
        "export": ["export", run, "--format", "safetensors", "--out", run / "exported.safetensors"],
        "compare": ["compare", run, run],
    }


def pairs() -> list[tuple[str, str]]:
    """A ring in which each command meets two others, and commands that meet themselves."""
    names = list(commands(Path(), Path()))
    Random(SEED).shuffle(names)
    return [*pairwise([*names, names[0]]), ("pretrain", "pretrain"), ("finetune", "finetune"), ("embed", "embed")]


def test_pairs_of_commands(run, tmp_path):
    tried, survived, data = 0, 0, run.parent / "data"
    for first, second in pairs():
        folder = tmp_path / f"{first} and {second}" / "run"
        shutil.copytree(run, folder)
        # Each is also started after the other has begun, since only then a training holds its lock for sure.
        processes = [start(commands(folder, data)[first])]
        time.sleep((tried % 3) * 2)
        processes.append(start(commands(folder, data)[second]))
        ends = [end(process) for process in processes]
        told = [error for code, error in ends if code == 2]
        assert all(code in (0, 2) for code, _ in ends), (first, second, ends)
        assert len(told) < 2 or "compare" in (first, second), (first, second, ends)
        allowed = (TOLD, "holds no evaluation")  # the second: to compare, when nothing is evaluated yet
        assert all(any(words in error for words in allowed) for error in told), (first, second, ends)
        for name in sorted({first, second} - {"compare"}):
            assert main([str(word) for word in commands(folder, data)[name]]) == 0, (first, second, name)
        dmjd.load_encoder(folder)
        if "finetune" in first + second:
            dmjd.load_classifier(folder)
        assert not list(folder.rglob(".*.tmp")), (first, second)
        tried, survived = tried + 1, survived + 1
    record("two commands at once on one run folder", tried=tried, lost=tried - survived)
