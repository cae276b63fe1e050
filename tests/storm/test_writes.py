"""Kills and full disks at every write: nothing lost, nothing silent, no traceback; the same command ends right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dense_sets import make_segmentation_set
from PIL import Image
from storm.table import record
from support import TINY, dmjd

FAULTS = Path(__file__).with_name("faults.py")
QUICK = ["--device", "cpu", "--num-workers", "0"]
ON_LABELS = [flag for flag in TINY if flag not in ("--no-final-eval", "--eval-every", "0")]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 labeled 32-pixel images in two parts."""
    root, rng = tmp_path_factory.mktemp("sets") / "images", np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        for i in range(count):
            file = root / part / ("dark" if i % 2 else "light") / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (32, 32, 3)) // 2 + 127 * (i % 2 == 0)
            Image.fromarray(image.astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A work folder with a finished run."""
    work = tmp_path_factory.mktemp("finished") / "work"
    dmjd(*pretraining(images, work))
    return work


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run to disturb."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def pretraining(images: Path, work: Path, steps: int = 4) -> list[str]:
    flags = ["--labels", "folder", "--steps", steps, "--checkpoint-every", 2, "--eval-every", 3, "--batch-size", 8]
    return [str(x) for x in ("pretrain", "folder", "--data", images, *ON_LABELS, *flags, "--out", work / "run")]


def storm(mode: str, work: Path, command: list[object], **setup: object) -> list[dict]:
    """Disturb a command at each of its writes; every case must end right."""
    work.mkdir(exist_ok=True)
    file = work.with_suffix(".json")
    file.write_text(json.dumps({"work": str(work), "command": [str(a) for a in command], **setup}))
    result = subprocess.run(
        [sys.executable, str(FAULTS), mode, str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    assert cases
    lost = [case for case in cases if not survived(case)]
    name = " ".join(map(str, command[: 2 if command[0] == "evaluate" else 1]))
    record(f"{mode} at every write of `{name}`", tried=len(cases), lost=len(lost))
    assert not lost, json.dumps(lost[:3], indent=1)
    return cases


def survived(case: dict) -> bool:
    """Whether the first run ended with one clear message, or in spite of the fault, and the second run right."""
    clear = "Traceback" not in case["messages"] and len(case["messages"].splitlines()) <= 20
    return case["code"] in (-9, 0, 2) and clear and case["again"] == 0 and not case["differ"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "full"])
class TestEveryWrite:
    """Each command of its own kind of files."""

    def test_pretrain(self, mode, images, tmp_path):
        storm(mode, tmp_path / "work", pretraining(images, tmp_path / "work"))

    def test_a_longer_pretraining(self, mode, images, tmp_path):
        dmjd(*pretraining(images, tmp_path / "work"))
        storm(mode, tmp_path / "work", pretraining(images, tmp_path / "work", steps=7))

    def test_frozen(self, mode, copied):
        storm(mode, copied, ["evaluate", "frozen", copied / "run", *QUICK])

    def test_finetune(self, mode, copied):
        few = ["--steps", 4, "--batch-size", 8, "--checkpoint-every", 2, "--log-every", 1, *QUICK]
        storm(mode, copied, ["evaluate", "finetune", copied / "run", *few])

    def test_segmentation(self, mode, copied, tmp_path):
        data = make_segmentation_set(tmp_path / "shapes", {"train": 8, "test": 4})
        few = ["--steps", 4, "--batch-size", 4, "--checkpoint-every", 2, "--log-every", 1]
        few += ["--decoder", "linear", "--img-size", 32]
        storm(mode, copied, ["evaluate", "segmentation", copied / "run", "--data", data, *few, *QUICK])

    @pytest.mark.parametrize("name", ["features.parquet", "features.npy"])
    def test_embed(self, mode, copied, name):
        storm(mode, copied, ["embed", copied / "run", "--out", copied / name, "--batch-size", 4, *QUICK])

    def test_export(self, mode, copied):
        out = copied / "vit.safetensors"
        storm(mode, copied, ["export", copied / "run", "--format", "safetensors", "--out", out])

    def test_show(self, mode, copied):
        storm(mode, copied, ["show", "reconstructions", copied / "run", "--out", copied / "figure.png"])
