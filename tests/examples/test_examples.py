"""The scripts in examples/ run, with tiny settings."""

import importlib.util
import json
import shutil
import sys

import pytest
from support import ROOT, TINY

from dmjd.cli.main import main


def run(monkeypatch, capsys, name: str, *arguments: object) -> str:
    """The output of ``python examples/NAME.py ARGUMENTS``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    capsys.readouterr()
    script.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def labeled_run(image_folder, tmp_path_factory):
    """A pre-trained run of two steps on 24 images of two classes."""
    root = tmp_path_factory.mktemp("examples")
    for split in ("train", "test"):
        shutil.copytree(image_folder, root / "images" / split)
    out = root / "run"
    flags = [*TINY, "--steps", 2, "--batch-size", 8, "--num-workers", 0, "--labels", "folder"]
    assert main([str(w) for w in ("pretrain", "folder", "--data", root / "images", "--out", out, *flags)]) == 0
    return out


def test_a_folder_becomes_a_timm_model(image_folder, tmp_path, monkeypatch, capsys):
    arguments = [image_folder, tmp_path / "run", "--steps", 2, "--img-size", 32, "--encoder", "vit_tiny_patch16"]
    text = run(monkeypatch, capsys, "folder_to_timm", *arguments)
    assert "vit_tiny_patch16_224 in timm" in text
    assert (tmp_path / "run" / "timm.safetensors").exists()


def test_low_shot_prints_both_starts(labeled_run, monkeypatch, capsys):
    text = run(monkeypatch, capsys, "low_shot", labeled_run, "--labels-per-class", 4, "--steps", 2, "--seeds", 1)
    assert text.count("random weights") == 2
    result = json.loads((labeled_run / "evaluation" / "linear.json").read_text())["result"]
    assert f"linear probe  pre-trained {100 * result['top1']:5.1f} " in text
    assert "classes of the classifier: cats, dogs" in text


def test_features_go_into_sklearn(labeled_run, tmp_path, monkeypatch, capsys):
    text = run(monkeypatch, capsys, "features_to_sklearn", labeled_run, "--out", tmp_path)
    assert "logistic regression on 24 features" in text
    assert (tmp_path / "test.parquet").exists()
