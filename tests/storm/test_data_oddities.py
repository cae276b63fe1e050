"""Odd COCO files, labels and images through the command line: right, or one clear error; nothing wrong in silence."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from data_oddities import COCO, IMAGES, LABELS, coco_command, image_command, label_command
from dense_sets import make_detection_set, make_run
from PIL import Image
from storm.table import record
from support import MAX_ERROR_LINES, TINY

from dmjd.cli.main import main

CASES = [
    *((coco_command, name, case) for name, case in COCO.items()),
    *((label_command, name, case) for name, case in LABELS.items()),
    *((image_command, name, case) for name, case in IMAGES.items()),
]

SHORT = [*TINY, "--steps", "3", "--num-workers", "0", "--batch-size", "24"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A detection set, an encoder, and a folder of images without oddities."""
    folder = tmp_path_factory.mktemp("oddities")
    make_detection_set(folder / "boxes", {"train": 4, "val": 2}, instance_masks=True)
    make_run(folder / "run")
    (folder / "plain").mkdir()
    rng = np.random.default_rng(0)
    for i in range(70):
        noise = rng.integers(0, 256, (40 + i % 3, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "plain" / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("always")
def test_data_oddities(work, capsys):
    lost = []
    for make, name, case in CASES:
        for leftover in ("data", "out"):
            shutil.rmtree(work / leftover, ignore_errors=True)
        command = make(work, case)
        if make is not coco_command:
            command = ["pretrain", "folder", *command, "--out", str(work / "out"), *SHORT]
        if problem := judged(command, case[1], case[2], capsys):
            lost.append(f"{make.__name__} {name}: {problem}")
    record("odd data", tried=len(CASES), lost=len(lost))
    assert len(CASES) > 100
    assert not lost, "\n".join(lost)


def judged(command: list[str], code: int, text: str, capsys) -> str | None:
    """What is wrong with the end of a command, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            given = main(command)
        except BaseException as error:
            return f"escaped: {type(error).__name__}: {error}"
    printed = capsys.readouterr().err + "".join(f"warning: {w.message}\n" for w in caught)
    lines = printed.splitlines()
    said = [line for line in lines if line.startswith(("error", "warning"))]
    if given != code:
        return f"exit status {given}: {printed[-300:]}"
    if "Traceback" in printed or (code and len(lines) > MAX_ERROR_LINES):
        return f"{len(lines)} lines: {printed[-300:]}"
    if any(not line.isprintable() for line in lines):
        return f"control characters: {printed[-300:]!r}"
    if not re.search(text or ".*", "\n".join(said), re.DOTALL):
        return f"it does not say {text}: {printed[-300:]}"
    return None
