"""Whole commands on the device: resume, kill -9, every evaluation for three steps, exports, one process of NCCL."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dense_sets import make_detection_set, make_run, make_segmentation_set
from device_runs import DEVICE, tiny_engine, train, write_images
from support import TINY, final, metrics

import dmjd as library
from dmjd.cli.main import main

pytestmark = pytest.mark.cuda

LONG = 30  # steps, enough for a signal to find the run in training

ON_LABELS = [flag for flag in TINY[:-2] if flag not in ("--no-final-eval", "--eval-every", "0")]  # without --device


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("sets") / "images")


@pytest.fixture(scope="module")
def run(device, images, tmp_path_factory) -> Path:
    """A run on the device, with figures, online kNN and the final evaluation."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = [*ON_LABELS, "--data", images, "--labels", "folder", "--eval-every", 4, "--out", out]
    assert main([*map(str, ["pretrain", "folder", *flags]), *training(8)]) == 0
    return out


def training(steps: int) -> list[str]:
    flags = ["--steps", steps, "--batch-size", 8, "--checkpoint-every", 2, "--device", DEVICE, "--num-workers", 0]
    return [str(flag) for flag in flags]


def command(images: Path, out: Path, steps: int) -> list[str]:
    own = [*TINY[:-2], "--data", images, "--optimizer", "adamw", "--drop-path", 0.1, "--out", out]
    return [*map(str, ["pretrain", "folder", *own]), *training(steps)]


def assert_same_run(first: Path, second: Path) -> None:
    """Equal to rounding: on a card, additions may come in another order."""
    a, b = final(first), final(second)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-3, msg=key)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_run_evaluates(run):
    assert {"knn", "linear"} <= {file.stem for file in (run / "evaluation").glob("*.json")}
    assert any("knn_top1" in line for line in metrics(run))


@pytest.fixture(scope="module")
def whole(device, images, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(images, out, LONG)) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "stop"])
def test_a_run_that_was_ended_resumes(whole, images, tmp_path, number):
    cut = command(images, tmp_path / "cut", LONG)
    process = subprocess.Popen([sys.executable, "-m", "dmjd", *cut], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(metrics_so_far(tmp_path / "cut")) < 5 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(number)
    process.wait(60)
    assert len(metrics_so_far(tmp_path / "cut")) < LONG, "it finished before the signal"
    assert main(cut) == 0
    assert_same_run(whole, tmp_path / "cut")


def metrics_so_far(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("task", ["knn", "linear", "linear_sweep", "finetune"])
def test_evaluations_on_labels(run, task):
    steps = {} if task == "knn" else {"steps": 3}
    steps |= {"batch_size": 4} if task == "finetune" else {}
    result = library.evaluate(task, run, device=DEVICE, num_workers=0, **steps)
    assert 0 <= result["result"]["top1"] <= 1


@pytest.mark.parametrize("decoder", ["upernet", "linear"])
@pytest.mark.parametrize("encoder", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_segmentation(device, tmp_path, encoder, decoder):
    data = make_segmentation_set(tmp_path / "shapes", {"train": 8, "test": 4})
    own = {"steps": 3, "batch_size": 4, "decoder": decoder, "img_size": 32, "num_workers": 0, "device": DEVICE}
    result = library.evaluate("segmentation", make_run(tmp_path / "run", encoder), data=str(data), **own)
    assert 0 <= result["result"]["miou"] <= 1


@pytest.mark.parametrize("instance_masks", [False, True])
def test_detection(device, tmp_path, instance_masks):
    pytest.importorskip("pycocotools")
    data = make_detection_set(tmp_path / "boxes", {"train": 8, "test": 4}, instance_masks)
    own = {"steps": 3, "batch_size": 4, "decoder_dim": 32, "img_size": 64, "num_workers": 0, "device": DEVICE}
    result = library.evaluate("detection", make_run(tmp_path / "run", img_size=64), data=str(data), **own)
    assert result["result"]["ap"] is None or 0 <= result["result"]["ap"] <= 1


@pytest.mark.parametrize(("kind", "ending"), [("timm", "safetensors"), ("onnx", "onnx")])
def test_exports_of_an_encoder_trained_there(run, tmp_path, kind, ending):
    """Both compare the outputs with the encoder's before they write."""
    exported = library.export(run, format=kind, out=tmp_path / f"encoder.{ending}")
    assert exported.path.stat().st_size > 1000


def test_embedding(run, images, tmp_path):
    out = tmp_path / "features.npy"
    assert main(["embed", str(run), "--data", str(images), "--out", str(out), "--device", DEVICE]) == 0
    assert out.exists()


def test_one_process_of_data_parallel_training_is_ordinary_training(device):
    """torchrun, NCCL on a card, gloo on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parents[1] / "device_ddp.py"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={port}", str(program)]
    result = subprocess.run(
        [sys.executable, *launcher],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    expected = train(tiny_engine(device, 3))
    assert found["losses"] == pytest.approx([s["loss"] for s in expected], rel=1e-4)
