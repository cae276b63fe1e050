"""Crops that prefer the valid area of images in which some pixels mean nothing."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dmjd.images.invalid import LEAST_VALID, has_invalid, valid_share
from dmjd.images.reading import OpenImage
from dmjd.rng import STREAM_VALID_CROP, hash64

CANDIDATES = 8  # crops of an image to choose from


def prefer_valid(
    boxes: Tensor, keys: Tensor, images: Sequence[OpenImage | np.ndarray], draw: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Replace boxes with too little valid area by the first of seven others that has enough, else by the best of all.

    The others are drawn from keys that follow from the image's own, so that a box is a function of image and key.

    Args:
        boxes: [b, 4] (top, left, height, width).
        keys: [b] int64, from which they were drawn.
        images: b images; those with invalid pixels are decoded.
        draw: draws boxes from keys [n] and image sizes [n, 2].

    Returns:
        [b, 4].
    """
    chosen = boxes
    for number, image in enumerate(images):
        pixels = image.stored if isinstance(image, OpenImage) else image
        if not isinstance(pixels, np.ndarray) or not has_invalid(pixels):
            continue
        others = hash64(STREAM_VALID_CROP, keys[number], torch.arange(1, CANDIDATES))
        sizes = torch.tensor([pixels.shape[:2]]).expand(len(others), 2)
        candidates = torch.cat([boxes[number, None], draw(others, sizes)])
        share = valid_share(pixels, candidates.numpy())
        best = int(np.argmax(share >= LEAST_VALID)) if (share >= LEAST_VALID).any() else int(np.argmax(share))
        if best:
            chosen = chosen.clone() if chosen is boxes else chosen
            chosen[number] = candidates[best]
    return chosen
