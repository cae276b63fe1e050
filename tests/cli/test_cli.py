"""The command line as a user runs it: help, suggestions, and one short message for each mistake."""

import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import TINY, dmjd, mistake


def test_help_is_quick_and_ends_with_an_example():
    started = time.perf_counter()
    result = dmjd("--help")
    assert time.perf_counter() - started < 5  # far above the second promised, far below an import of torch
    assert result.stdout.splitlines()[-1].strip().startswith("dmjd pretrain")
    for command in ("pretrain", "evaluate", "show", "embed", "export", "compare"):
        text = dmjd(command, "--help").stdout
        assert text.splitlines()[-1].strip().startswith(("dmjd", "torchrun"))
        assert "torch" not in sys.modules or "--out" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["pretrain", "digit"], "did you mean 'digits'"),
        (["pretrain", "--mask-ration", "0.5"], "did you mean --mask-ratio?"),
        (["pretrain", "digits", "--mask-ratio", "1.0"], "mask_ratio must be between 0 and 1"),
        (["pretrain", "digits", "--mask-ratio", "-1"], "mask_ratio"),
        (["pretrain", "digits", "--mask-ratio", "nan"], "mask_ratio"),
        (["pretrain", "digits", "--mask-ratio", "much"], "invalid float value: 'much'"),
        (["pretrain", "digits", "--batch-size", "0"], "batch_size must be at least 1"),
        (["pretrain", "digits", "--in-chans", "0"], "in_chans must be at least 1"),
        (["pretrain", "--data", "x"], "--out DIR"),
        (["pretrain"], "--data FOLDER"),
        (["evaluate", "kn", "x"], "did you mean 'knn'"),
        (["show", "mask", "x"], "did you mean 'masks'"),
        (["show", "neighbours", "x"], "did you mean 'neighbors'"),
        (["embed", "x"], "required: --out"),
        (["export", "x", "--format", "tim", "--out", "x"], "did you mean 'timm'"),
        (["compare"], "required: RUN"),
    ],
)
def test_mistakes_before_anything_heavy(capsys, arguments, message):
    assert message in mistake(capsys, *arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder", "vit_tinny_patch8"], "did you mean 'vit_tiny_patch8'"),
        (["--img-size", "30"], "not divisible by the encoder's 8-pixel patch"),
        (["--target", "hogg"], "did you mean 'hog'"),
        (["--block-size", "3"], "does not divide the 4 x 4 token grid"),
        (["--pred-ratio", "0.3"], r"pred_ratio must lie in [0.5, 1]"),
        (["--mask-ratio", "0.99"], "leaves none of the 16 masking units visible"),
        (["--hog-cell", "3"], "hog_cell 3 does not divide"),
        (["--device", "cuda:9"], "device must be auto, cpu or cuda"),
        (["--precision", "fp16"], "fp16 needs a CUDA device"),
        (["--depth", "1", "2", "3"], "takes 1 number(s)"),
    ],
)
def test_mistakes_found_when_the_parts_are_built(capsys, tmp_path, flags, message):
    arguments = ["pretrain", "digits", "--out", tmp_path / "run", "--device", "cpu", *flags]
    assert message in mistake(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_data_that_is_none(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.jpg").write_text("x")
    common = ["--out", tmp_path / "run", *TINY, "--steps", 1]
    assert "no images" in mistake(capsys, "pretrain", "folder", "--data", tmp_path / "empty", *common)
    error = mistake(capsys, "pretrain", "folder", "--data", tmp_path / "emty", *common)
    assert "empty" in error
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def as_somebody() -> Iterator[None]:
    """Give up the superuser's right to read everything, where the tests have it."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_a_folder_without_permission(capsys, tmp_path):
    for name in (
        "pretraining.run",
        "data.sources.registry",
        "data.train_loader",
    ):  # while the interpreter's own files can be read
        importlib.import_module(f"dmjd.{name}")
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        data = Path(root) / "closed"
        data.mkdir(mode=0)
        with as_somebody():
            error = mistake(capsys, "pretrain", "folder", "--data", data, "--out", tmp_path / "run", *TINY)
        assert "no permission" in error
        assert str(data) in error
        data.chmod(0o755)


def test_folders_that_are_no_runs(capsys, tmp_path):
    assert "is no run folder" in mistake(capsys, "evaluate", "knn", tmp_path / "nothing", "--data", "digits")
    assert "is no run folder" in mistake(capsys, "evaluate", "knn", tmp_path)
    assert mistake(capsys, "show", "masks", tmp_path, "--out", tmp_path / "x.png")
    (tmp_path / "file").write_text("x")
    assert "is a file" in mistake(capsys, "pretrain", "digits", "--out", tmp_path / "file", *TINY, "--steps", 1)


def test_the_whole_way(tmp_path, image_folder):
    """Folder -> encoder -> evaluation with folder labels -> images, each by the command a user types."""
    run = tmp_path / "run"
    dmjd("pretrain", "folder", "--data", image_folder, "--out", run, *TINY, "--steps", 3, "--batch-size", 8)
    table = dmjd(
        "evaluate",
        "knn",
        run,
        "--data",
        image_folder,
        "--test-data",
        image_folder,
        "--labels",
        "folder",
        "--device",
        "cpu",
    )
    assert "random" in table.stdout.lower()
    assert (run / "evaluation" / "knn.json").exists()
    for kind in ("masks", "targets", "reconstructions", "attention", "neighbors"):
        dmjd("show", kind, run, "--out", tmp_path / f"{kind}.png", "--num-images", 2)
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    table = dmjd("compare", run, run, "--out", tmp_path / "bars.png").stdout
    assert "knn" in table
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    features = dmjd("embed", run, "--out", tmp_path / "features.npy", "--half").stdout.strip()
    assert np.load(features).shape == (24, 32)
    usage = dmjd("export", run, "--format", "timm", "--out", tmp_path / "vit.safetensors").stdout
    found: dict = {}
    exec(usage.partition("Load it by:")[2].strip(), found)
    assert found["model"].num_features == 32
    one_class = dmjd(
        *(
            "evaluate",
            "knn",
            run,
            "--data",
            image_folder / "cats",
            "--test-data",
            image_folder / "cats",
            "--labels",
            "folder",
        ),
        check=False,
    )
    assert one_class.returncode == 2
