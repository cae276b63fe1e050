"""``dmjd bench`` measures the real step. The speed itself is not tested."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import dmjd
from dmjd.cli.main import main
from dmjd.data.sources.registry import open_source
from dmjd.engine.console import Console
from dmjd.model import MaskedImageModel
from dmjd.pretraining.bench import PARTS, batch_size_without_images, bench, matmul_rate, preprocess_to_measure
from dmjd.pretraining.images import resolve_preprocess

TINY = {"embed_dim": (16,), "depth": (1,), "num_heads": 2, "batch_size": 8}


@pytest.mark.parametrize("data", [None, "digits"])
def test_bench_measures_a_recipe(data):
    config = dmjd.recipes.digits(accumulate=2, **TINY)
    result = bench(dataclasses.replace(config, data=data), steps=2)
    assert set(result["parts"]) == set(PARTS)
    assert sum(result["parts"].values()) == pytest.approx(1)
    assert result["images_per_s"]["step"] > 0
    assert (result["images_per_s"]["with_loader"] is None) == (data is None)
    expected = result["images_per_s"]["step"] * result["gflop_per_image"] * 1e9 / (result["matmul_tflops"] * 1e12)
    assert result["mfu"] == pytest.approx(expected)
    assert result["peak_memory_gb"] > 0.05
    json.dumps(result)


def test_invalid_pixels_have_no_loss_in_any_measurement(tmp_path, monkeypatch):
    """Neither in the steps, nor in those of which each part is measured."""
    for i in range(16):
        image = np.random.default_rng(i).random((40, 40, 3), np.float32)
        image[:20] = np.nan
        np.save(tmp_path / f"{i:02}.npy", image)
    known = []
    losses = MaskedImageModel.losses

    def recorded(self, latent, targets, masks, valid=None):
        known.append(valid is not None and not valid.all())
        return losses(self, latent, targets, masks, valid)

    monkeypatch.setattr(MaskedImageModel, "losses", recorded)
    size = {"encoder": "vit_tiny_patch8", "img_size": 32, "num_workers": 0, "device": "cpu"}
    bench(dmjd.recipes.folder(str(tmp_path), nodata="auto", **size | TINY), steps=2)
    assert known == [False] * 5 + [True] * 7  # synthetic images, those of the folder, and twice their parts


def test_images_are_preprocessed_as_in_a_run(image_folder):
    given = {"nodata": "0", "alpha": "invalid", "value_range": (0, 200), "img_size": (32, 64)}
    config = dmjd.recipes.folder(str(image_folder), **given)
    source = open_source(str(image_folder))
    assert preprocess_to_measure(config) == resolve_preprocess(config, source, None, Console(enabled=False))
    assert len(preprocess_to_measure(config.replace(in_chans=5)).mean) == 5


def test_each_kind_of_device_has_a_batch_size():
    sizes = [batch_size_without_images(torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert sizes == [16, 128, 128]


def test_matmul_rate_is_that_of_a_real_machine():
    assert 1e9 < matmul_rate(torch.device("cpu"), torch.float32, repeats=1) < 1e15


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--batch-size", "8", "--steps", "1"]
    assert main(["bench", "digits", *flags, "--json", "b.json"]) == 0
    assert "images/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text())["settings"]["steps"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]  # nothing else is written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "digit"], "did you mean 'digits'"),
        (["bench", "--encodr", "x"], "did you mean --encoder"),
        (["bench", "digits", "--steps", "0"], "steps"),
        (["bench", "--data", "nowhere/at/all"], "there is no nowhere/at/all"),
    ],
)
def test_errors(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
