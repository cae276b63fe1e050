"""Runs to report on, shared by the tests of this folder."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import TINY

import dmjd
from dmjd.cli.main import main

CLASSES = ["<img src=x onerror=alert(1)>", '[b]it\'s "q"[b]', "plain & simple"]
FILES = ["a'b\".png", "<b>bold<b>.png", "two\nlines.png", "\x1b[31mred.png", "猫 été.png"]


def hostile_set(root: Path) -> Path:
    """Images with splits train and test, in folders and files whose names are markup."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                file = FILES[i] if i < len(FILES) else f"{i:02d}.png"
                image = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                image[..., number] += 120
                image[i % 8 * 4 :, :, :] //= 2
                Image.fromarray(image).save(folder / file)
    first = root / "train" / CLASSES[2]
    (first / "19.png").write_bytes((first / "18.png").read_bytes())
    (first / "broken<i>.png").write_text("no image")
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run on images with hostile names, with a kNN evaluation; named like markup itself."""
    folder = tmp_path_factory.mktemp("reports")
    data, run = hostile_set(folder / "data"), folder / "<script>alert(1)"
    flags = [*TINY, "--steps", "40", "--batch-size", "16", "--labels", "folder", "--num-workers", "0"]
    with warnings.catch_warnings(action="ignore"):
        assert main(["pretrain", "folder", "--data", str(data), "--out", str(run), *flags]) == 0
        assert main(["evaluate", "knn", str(run)]) == 0
    return run


@pytest.fixture(scope="session")
def second(finished, tmp_path_factory) -> Path:
    """A shorter run on the same images, without evaluation."""
    run = tmp_path_factory.mktemp("reports") / "second"
    flags = [*TINY, "--steps", "5", "--batch-size", "16", "--num-workers", "0"]
    with warnings.catch_warnings(action="ignore"):
        assert main(["pretrain", "folder", "--data", str(finished.parent / "data"), "--out", str(run), *flags]) == 0
    return run


@pytest.fixture(scope="session")
def single(finished, tmp_path_factory) -> Path:
    """A report on one run, in a new folder."""
    return dmjd.report(finished, out=tmp_path_factory.mktemp("page") / "new" / "single.html", num_images=60)


@pytest.fixture(scope="session")
def both(finished, second, tmp_path_factory) -> Path:
    """A report on two runs, one of them given twice; the file existed."""
    out = tmp_path_factory.mktemp("page") / "both.html"
    out.write_text("old")
    return dmjd.report(finished, second, finished, out=out, num_images=60)
