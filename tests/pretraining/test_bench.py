"""``dmjd bench`` measures the real step. The speed itself is not tested."""

import dataclasses
import json

import pytest
import torch

import dmjd
from dmjd.cli.main import main
from dmjd.pretraining.bench import PARTS, bench, matmul_rate

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
