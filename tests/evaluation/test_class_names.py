"""Classes with names that terminals, rich, matplotlib or codecs misread: results and figures come out all the same."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import tiny_encoder

from dmjd.cli.main import main
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE

NAMES = [b"$x_1$", b"[b]", b"caf\xe9", b"_x\x1b[31m", b"two\nlines", b":smile:"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in (b"train", b"test"):
        for name in NAMES:
            folder = os.path.join(os.fsencode(root), split, name)
            os.makedirs(folder)
            for i in range(3):
                with open(os.path.join(folder, b"%d.png" % i), "wb") as file:
                    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return root


def test_results_figures_and_tables(images, tmp_path, capfd):
    (tmp_path / ENCODER_FILE).write_bytes(encoder_bytes(tiny_encoder()))
    out = tmp_path / os.fsdecode(b"run $a_b$ [b]")
    common = [str(tmp_path / ENCODER_FILE), "--data", str(images), "--labels", "folder"]
    cpu = ["--device", "cpu", "--num-workers", "0"]
    train = ["--steps", "1", "--batch-size", "6", "--out", str(out)]
    assert main(["evaluate", "knn", *common, *cpu, "--out", os.fsdecode(b"caf\xe9")]) == 2  # before any work
    assert main(["evaluate", "finetune", *common, *cpu, *train]) == 0
    assert main(["evaluate", "knn", *common, *cpu, "--out", str(out)]) == 0
    assert main(["show", "neighbors", *common, "--out", str(tmp_path / "neighbors.png"), "--num-images", "6"]) == 0
    assert main(["embed", *common, *cpu, "--out", str(tmp_path / "features.parquet")]) == 0
    assert main(["compare", str(out), "--out", str(tmp_path / "bars.png")]) == 0
    printed = "".join(capfd.readouterr())
    assert "\x1b[31m" not in printed
    assert "Glyph" not in printed
    assert json.loads((out / "evaluation" / "finetune.json").read_text())["data"]["classes"] == len(NAMES)
    assert len(list(out.rglob("confusion.png"))) == 2
    assert (tmp_path / "neighbors.png").exists()
    assert (tmp_path / "bars.png").exists()
    classes = pq.read_table(tmp_path / "features.parquet")["class"].to_pylist()
    assert set(classes) == {"$x_1$", "[b]", "caf\\udce9", "_x\x1b[31m", "two\nlines", ":smile:"}
