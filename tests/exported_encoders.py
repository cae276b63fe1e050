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


def saved(folder: Path, name: str, size=224, chans=3, preprocess=True, nodata=None, **options) -> tuple[Encoder, Path]:
    """An encoder in which all weights are random, and its file."""
    torch.manual_seed(0)
    encoder = create_encoder(name, size, chans, **options).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if preprocess:
        encoder.preprocess = Preprocess(encoder.img_size, chans, (0.4,) * chans, (0.2,) * chans, nodata=nodata)
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


def holed_images(encoder: Encoder) -> torch.Tensor:
    """Four normalized images with NaN: in some tokens, in one, in none, and in all."""
    images = random_images(encoder, 4)
    P = encoder.patch_size
    images[0, :, : P + P // 2 + 1] = torch.nan  # the first row of tokens, and more than half of the second
    images[1, :, :P, : P // 2] = torch.nan  # half of a token, which counts
    images[1, 0, :P, P : P + P // 2 + 1] = torch.nan  # of one channel alone: it counts, if there are others
    images[2, 0, 0, 0] = 0.0  # a valid mean
    images[3] = torch.nan
    return images
