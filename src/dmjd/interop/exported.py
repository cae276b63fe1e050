"""What an export is: its path and usage, and the check that it computes what the encoder does."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dmjd.encoders.base import Encoder
from dmjd.encoders.pooling_lines import knows_invalid
from dmjd.images.invalid import pooled_tokens

TOLERANCE = 1e-4  # absolute and relative

BATCHES = (1, 3)  # tested; different from the batch size of the export, to detect a fixed one


@dataclass(frozen=True)
class Exported:
    """An exported file or folder, Python code that loads it, and its address on the hub if it was uploaded."""

    path: Path
    usage: str
    address: str | None = None


class TokensAndFeatures(nn.Module):
    """The function that is exported where a whole program is.

    If the encoder's preprocessing knows invalid pixels, they are NaN in its input, or the mark of that preprocessing,
    and the features are pooled without them, as by :meth:`Encoder.encode`.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, prefix + N, D], [B, D]."""
        if not knows_invalid(self.encoder):
            tokens = self.encoder(images)
            return tokens, self.encoder.pool(tokens)
        # ONNX has no sign bit: the inverse of -0.0 tells it from 0.0.
        invalid = images.isnan() | ((images == 0) & (1 / images < 0))
        tokens = self.encoder(torch.where(invalid, 0.0, images))
        return tokens, self.encoder.pool(tokens, pooled_tokens(~invalid, self.encoder.patch_size))


def random_images(encoder: Encoder, batch: int) -> Tensor:
    """Random normalized images, the same at each call; torch's global generator is not used."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, encoder.in_chans, *encoder.img_size, generator=generator)


def program_images(encoder: Encoder, batch: int) -> Tensor:
    """:func:`random_images` for a program, the last with invalid pixels in all but one token, if it knows them."""
    images = random_images(encoder, batch)
    if knows_invalid(encoder):
        valid = images[-1, :, : encoder.patch_size, : encoder.patch_size].clone()
        images[-1] = torch.nan
        images[-1, :, : encoder.patch_size, : encoder.patch_size] = valid
    return images


def check_close(name: str, theirs: np.ndarray, ours: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Raise a ValueError if an export computes other numbers than the encoder."""
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=tolerance, atol=tolerance):
        same_shape = theirs.shape == ours.shape
        gap = f"by up to {np.abs(theirs - ours).max():.1e}" if same_shape else f"in shape {theirs.shape}"
        raise ValueError(f"{name} differ from the encoder's {gap}; nothing was written")


def scaling(encoder: Encoder) -> str:
    """A comment on how to normalize pixel values; empty if the preprocessing is unknown."""
    if (preprocess := encoder.preprocess) is None:
        return ""
    mean, std = ([round(value, 4) for value in values] for values in (preprocess.mean, preprocess.std))
    scale = "0..255, divided by 255"
    if preprocess.value_range is not None:
        low, high = preprocess.value_range
        scale = f"clipped to {low:g}..{high:g}, minus {low:g}, divided by {high - low:g}"
    return f": {scale}, minus {mean}, divided by {std}"


def images_comment(encoder: Encoder) -> str:
    """A comment on the images that an exported program takes."""
    shape = f"[B, {encoder.in_chans}, {encoder.img_size[0]}, {encoder.img_size[1]}]"
    invalid = "; NaN where invalid" if knows_invalid(encoder) else ""
    return f"# images: float32 {shape}{scaling(encoder)}{invalid}"
