"""Shared fixtures."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the processes that tests start
torch.set_num_threads(2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For steps of tiny models: several threads would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
