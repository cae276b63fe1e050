"""Fixtures of data tests: a folder of noise, and sets with masks and boxes."""

from pathlib import Path

import numpy as np
import pytest
from dense_sets import make_detection_set, make_segmentation_set
from PIL import Image

from dmjd.data.sources.folder import FolderSource


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory) -> FolderSource:
    """23 images of different sizes, one of which is unreadable."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for i in range(23):
        size = rng.integers(20, 40, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"{i:02}.png")
    (root / "05.png").write_text("words")
    return FolderSource(root)


@pytest.fixture
def camvid_layout(tmp_path) -> Path:
    """A segmentation set of 5 and 3 images."""
    return make_segmentation_set(tmp_path / "set", {"train": 5, "test": 3})


@pytest.fixture
def coco_layout(tmp_path) -> Path:
    """A detection set of 4 and 2 images, with instance masks."""
    return make_detection_set(tmp_path / "boxes", {"train": 4, "val": 2}, instance_masks=True)
