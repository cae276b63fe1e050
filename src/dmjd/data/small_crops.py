"""Crops of small images in workers, with the pixels that they have in memory."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dmjd.images.reading import OpenImage
from dmjd.images.resampling import resample

# On the CPU, larger images are cropped faster one by one in workers than in batches.
MOST_PIXELS = 96 * 96


def is_small(image: OpenImage) -> bool:
    """Whether an image could be one of a set in memory."""
    return image.size[0] * image.size[1] <= MOST_PIXELS


def decode_small(image: OpenImage) -> OpenImage:
    """The image, decoded if it is small: a damaged one is found before boxes are drawn, as in memory."""
    return replace(image, stored=image.read()) if is_small(image) else image


def crop_small(images: Sequence[OpenImage], boxes: Tensor, flipped: Tensor, size: tuple[int, int]) -> dict[int, Tensor]:
    """Crop, resize and flip the small ones among images, those of one shape and type at once.

    Args:
        images: of a batch.
        boxes: [B, 4] (top, left, height, width) in pixels.
        flipped: [B] bool.
        size: (h, w) of the results.

    Returns:
        Position in the batch -> [C, h, w].
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    pixels = {i: image.read() for i, image in enumerate(images) if is_small(image)}
    for i, image in pixels.items():
        alike.setdefault((image.shape, image.dtype), []).append(i)
    crops: dict[int, Tensor] = {}
    for group in alike.values():
        batch = torch.from_numpy(np.stack([pixels[i] for i in group])).permute(0, 3, 1, 2).contiguous()
        crops |= zip(group, resample(batch, boxes[group], size, flipped[group]), strict=True)
    return crops
