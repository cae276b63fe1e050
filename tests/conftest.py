"""Shared pieces: a folder of images, tiny settings, and the command line run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the processes the tests start
torch.set_num_threads(2)

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# A model and a run of a second or two, as flags.
TINY = [
    "--encoder",
    "vit_tiny_patch8",
    "--embed-dim",
    "32",
    "--depth",
    "2",
    "--num-heads",
    "2",
    "--img-size",
    "32",
    "--decoder-dim",
    "32",
    "--decoder-depth",
    "1",
    "--decoder-heads",
    "2",
    "--block-size",
    "1",
    "--log-every",
    "1",
    "--eval-every",
    "0",
    "--no-final-eval",
    "--device",
    "cpu",
]


def dmjd(*arguments: object, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess:
    """``dmjd ...`` in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "dmjd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 images of different sizes in two class folders."""
    root = tmp_path_factory.mktemp("my images é")
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        height, width = (int(v) for v in rng.integers(40, 90, 2))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root
