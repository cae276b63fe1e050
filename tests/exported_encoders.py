"""Encoders to export: small, with all weights random."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.stored import encoder_bytes
from dmjd.images.preprocess import Preprocess

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}

SMALL_CONV = {"embed_dims": (16, 16, 32), "depths": (1, 1, 2), "num_heads": 2}


def saved(folder: Path, name: str, size=224, chans=3, preprocess=True, **options) -> tuple[Encoder, Path]:
    """An encoder in which all weights are random, and its file."""
    torch.manual_seed(0)
    encoder = create_encoder(name, size, chans, **options).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if preprocess:
        encoder.preprocess = Preprocess(encoder.img_size, chans, (0.4,) * chans, (0.2,) * chans)
    file = folder / "encoder.safetensors"
    file.write_bytes(encoder_bytes(encoder))
    return encoder, file


def run_lines(usage: str, **given) -> dict:
    """Run the code that an export prints; returns its names."""
    exec(usage, given)
    return given


def random_images(encoder: Encoder, batch=2) -> torch.Tensor:
    return torch.randn(batch, encoder.in_chans, *encoder.img_size)


def smooth_image(height: int, width: int) -> Image.Image:
    """A photograph-like image: smooth, with edges."""
    y, x = np.mgrid[:height, :width] / 20
    channels = [np.sin(x + k) * np.cos(y * (k + 1)) + (x > y) for k in range(3)]
    return Image.fromarray(np.uint8(np.clip(60 * np.stack(channels, -1) + 90, 0, 255)))
