"""Random resized crop and flip, drawn from an image's key."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dmjd.images.resampling import resize_box
from dmjd.rng import STREAM_CROP, STREAM_FLIP, hash64, uniform

_TRIES = 10


def crop_boxes(
    keys: Tensor,
    sizes: Tensor,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Draw boxes with the distribution of torchvision's RandomResizedCrop, each from its image's key.

    Up to ten times an area (uniform) and an aspect ratio (log-uniform) are drawn; the first box that fits the image
    gets a uniform position. If none fits, the largest centered box of an allowed aspect ratio is taken.

    Args:
        keys: [B] int64.
        sizes: [B, 2] (H, W) of the images.
        scale: range of the area, relative to the image.
        ratio: range of width / height.

    Returns:
        [B, 4] float64 of whole numbers: (top, left, height, width), inside the image, at least one pixel.
    """
    tries = torch.arange(_TRIES, device=keys.device)[:, None]
    draws = torch.arange(4, device=keys.device)
    u = uniform(hash64(STREAM_CROP, keys[:, None, None], tries, draws))  # B, 10, 4
    H, W = (side.to(torch.float64)[:, None] for side in sizes.unbind(1))  # B, 1
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[..., 0])  # B, 10
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    aspect = torch.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[..., 1])
    width, height = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    top, left = (u[..., 2] * (H - height + 1)).floor(), (u[..., 3] * (W - width + 1)).floor()
    boxes = torch.stack([top, left, height, width], dim=-1)  # B, 10, 4
    first = fits.to(torch.uint8).argmax(1)
    drawn = boxes[torch.arange(len(keys), device=keys.device), first]  # B, 4
    return torch.where(fits.any(1, keepdim=True), drawn, _centered_boxes(H[:, 0], W[:, 0], ratio))


def _centered_boxes(H: Tensor, W: Tensor, ratio: tuple[float, float]) -> Tensor:
    """[B, 4]: the image, cut at both ends of its longer side to the nearest allowed aspect ratio."""
    width = torch.minimum(W, (H * ratio[1]).round().clamp(min=1))
    height = torch.minimum(H, (W / ratio[0]).round().clamp(min=1))
    return torch.stack([((H - height) / 2).floor(), ((W - width) / 2).floor(), height, width], dim=-1)


def flips(keys: Tensor) -> Tensor:
    """Which images are flipped left to right, half of them: [B] int64 keys -> [B] bool."""
    return hash64(STREAM_FLIP, keys) < 0


def crop_resize(image: np.ndarray, box: Sequence[float], size: tuple[int, int], flip: bool = False) -> Tensor:
    """Crop, resize (bicubic, antialiased) and flip one image.

    8-bit images and boxes of whole numbers take torch's kernel for bytes, several times as fast as Pillow's. Like
    torchvision's RandomResizedCrop it reads no pixel outside the box.

    Args:
        image: [H, W, C] uint8 or float32 on the 0..255 scale.
        box: (top, left, height, width) in pixels.
        size: (h, w) of the result.
        flip: left to right.

    Returns:
        [C, h, w], data type of ``image``; 8-bit color is channels last in memory, as the kernel leaves it.
    """
    top, left, height, width = (int(x) for x in box)
    if image.dtype == np.uint8 and (top, left, height, width) == tuple(box):
        H, W, C = image.shape
        cut = image.reshape(H, W * C)[
            top : top + height, C * left : C * (left + width)
        ].copy()  # contiguous: the kernel's own copy is slow
        pixels = torch.from_numpy(cut).view(1, height, width, C).permute(0, 3, 1, 2)
        resized = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    else:
        resized = resize_box(image, box, size)[None]
    return (resized.flip(-1) if flip else resized)[0]
