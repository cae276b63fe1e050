"""Shared by tests: tiny settings, running the command line, small sets of features, small encoders."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from dmjd.cli.failures import MAX_ERROR_LINES
from dmjd.cli.main import main
from dmjd.encoders.registry import create_encoder
from dmjd.evaluation.frozen.features import Features
from dmjd.images.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real data, a real teacher, files that go wrong; not part of the project
REAL_DATA = SHARED / "data"
GOLDEN = ROOT / "tests" / "golden"

# Flags of a model and run that take a second or two.
TINY = [
    "--encoder",
    "vit_tiny_patch8",
    "--embed-dim",
    "32",
    "--depth",
    "2",
    "--num-heads",
    "2",
    "--img-size",
    "32",
    "--decoder-dim",
    "32",
    "--decoder-depth",
    "1",
    "--decoder-heads",
    "2",
    "--block-size",
    "1",
    "--log-every",
    "1",
    "--eval-every",
    "0",
    "--no-final-eval",
    "--no-report",
    "--device",
    "cpu",
]

TINY_FIELDS = {
    "encoder": "vit_tiny_patch8",
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "img_size": 32,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "block_size": 1,
    "log_every": 1,
    "eval_every": 0,
    "final_eval": False,
    "report": False,
    "device": "cpu",
}

FEATURE_SIZE = (16, 16)


def dmjd(*arguments: object, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run ``dmjd ...`` in a separate process."""
    result = subprocess.run(
        [sys.executable, "-m", "dmjd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def mistake(capsys, *arguments: object) -> str:
    """Run a command that must fail with a user error, in this process; returns its stderr."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) <= MAX_ERROR_LINES
    return captured.err


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "final.safetensors")


def assert_same_bits(first: Path, second: Path) -> None:
    a, b = final(first), final(second)
    assert a.keys() == b.keys()
    assert any(key.startswith("optimizer.") for key in a)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert (first / "encoder.safetensors").read_bytes() == (second / "encoder.safetensors").read_bytes()
    same = ("step", "loss", "mim", "vis", "lr", "grad_norm", "epoch")
    assert [{k: m[k] for k in same} for m in metrics(first)] == [{k: m[k] for k in same} for m in metrics(second)]


def features(x, labels) -> Features:
    x = torch.as_tensor(np.asarray(x), dtype=torch.float32)
    return Features(x, torch.as_tensor(np.asarray(labels), dtype=torch.int64), torch.arange(len(x)))


def blobs(n: int, classes: int, dim: int, noise: float, seed: int) -> Features:
    """Gaussian clouds around directions that do not depend on the seed."""
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    labels[:classes] = np.arange(classes)
    return features(centers[labels] + noise * rng.normal(size=(n, dim)), labels)


def tiny_encoder(seed: int = 0):
    torch.manual_seed(seed)
    encoder = create_encoder("vit_tiny_patch8", img_size=FEATURE_SIZE, embed_dim=32, depth=1, num_heads=2)
    encoder.preprocess = Preprocess(FEATURE_SIZE)
    return encoder


SMALL_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SMALL_CONV_VIT = {"embed_dims": (8, 12, 16), "depths": (2, 1, 2), "num_heads": 2}


def small_encoder(name: str, seed: int = 0, **options):
    """A small encoder with random biases and norm weights, in evaluation mode."""
    torch.manual_seed(seed)
    encoder = create_encoder(name, **(SMALL_CONV_VIT if name.startswith("conv") else SMALL_VIT), **options)
    for key, parameter in encoder.named_parameters():
        if key != "pos_embed" and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in key and key.endswith("weight")), std=0.2)
    return encoder.eval()


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def smooth_image(height: int = 12, width: int = 16, channels: int = 3) -> np.ndarray:
    """[H, W, C] uint8 gradients, which JPEG changes little."""
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    planes = [rows * 10 + 20 * c + columns * (4 + c) for c in range(channels)]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Encode a PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
