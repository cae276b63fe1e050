"""Random scale, position, flip and color jitter of images with masks or boxes, on a canvas of fixed size.

Random choices are a pure function of the image's key. Shapes: H, W image, h, w canvas, C channel, n box or instance
of one image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmjd.data.transforms import flips
from dmjd.images.resampling import resize_box
from dmjd.rng import STREAM_COLOR, STREAM_PLACE, hash64, uniform

IGNORE = -1  # class of pixels left out of losses and metrics

Size = tuple[int, int]


@dataclass(frozen=True)
class GeometricTransform:
    """Resizes an image, puts a canvas over it, and flips the result.

    Attributes:
        image, resized: (height, width) of the image before and after resizing.
        canvas: (h, w) of the result.
        top, left: corner of the canvas in the resized image; negative where the canvas begins outside the image.
        flip: left to right.
    """

    image: Size
    resized: Size
    canvas: Size
    top: int = 0
    left: int = 0
    flip: bool = False

    def visible(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the resized image on the canvas, each as (start, stop)."""
        rows, columns = (
            (max(0, start), min(length, start + side))
            for start, length, side in zip((self.top, self.left), self.resized, self.canvas, strict=True)
        )
        return rows, columns


def cover_scale(image: Size, canvas: Size) -> float:
    """The scale at which an image just covers a canvas; the aspect ratio is kept."""
    return max(canvas[0] / image[0], canvas[1] / image[1])


def fit_scale(image: Size, canvas: Size) -> float:
    """The scale at which an image just fits into a canvas; the aspect ratio is kept."""
    return min(canvas[0] / image[0], canvas[1] / image[1])


def scaled_size(image: Size, scale: float) -> Size:
    """(height, width) times a scale, rounded; at least one pixel each."""
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def random_transform(
    key: int, image: Size, canvas: Size, base: float, scale: tuple[float, float], flip: bool
) -> GeometricTransform:
    """Random scale (uniform in ``base * scale``), position (uniform; smaller images lie inside the canvas) and flip.

    Args:
        key: key of the image.
        image, canvas: (height, width).
        base: scale that is multiplied by the random factor.
        scale: range of the random factor.
        flip: whether to flip half of the images.
    """
    u = uniform(hash64(STREAM_PLACE, key, torch.arange(3))).tolist()
    resized = scaled_size(image, base * (scale[0] + (scale[1] - scale[0]) * u[0]))
    top, left = (_offset(v, length - side) for v, length, side in zip(u[1:], resized, canvas, strict=True))
    return GeometricTransform(image, resized, canvas, top, left, flip and bool(flips(torch.tensor(key))))


def _offset(u: float, excess: int) -> int:
    """An integer, uniform between 0 and ``excess`` (which may be negative), both included."""
    return math.floor(u * (excess + 1)) if excess >= 0 else -math.floor(u * (1 - excess))


def transform_image(image: np.ndarray, transform: GeometricTransform, fill: tuple[float, ...]) -> Tensor:
    """[H, W, C] on the 0..255 scale -> [C, h, w] of the same type: bicubic, ``fill`` per channel outside."""
    (r0, r1), (c0, c1) = transform.visible()
    (H, W), (h, w) = transform.image, transform.resized
    part = resize_box(image, (r0 * H / h, c0 * W / w, (r1 - r0) * H / h, (c1 - c0) * W / w), (r1 - r0, c1 - c0))
    background = torch.tensor(fill, dtype=torch.float32)
    background = (background.round() if part.dtype == torch.uint8 else background).to(part.dtype)
    canvas = background.view(-1, 1, 1).repeat(1, *transform.canvas)
    canvas[:, r0 - transform.top : r1 - transform.top, c0 - transform.left : c1 - transform.left] = part
    return canvas.flip(-1) if transform.flip else canvas


def transform_masks(masks: np.ndarray, transform: GeometricTransform, fill: int) -> Tensor:
    """[..., H, W] integers -> [..., h, w] of the same type: nearest neighbor, ``fill`` outside."""
    (r0, r1), (c0, c1) = transform.visible()
    (H, W), (h, w) = transform.image, transform.resized
    rows = ((np.arange(r0, r1) + 0.5) * H / h).astype(np.int64)
    columns = ((np.arange(c0, c1) + 0.5) * W / w).astype(np.int64)
    canvas = np.full((*masks.shape[:-2], *transform.canvas), fill, masks.dtype)
    shown = masks[..., rows[:, None], columns]
    canvas[..., r0 - transform.top : r1 - transform.top, c0 - transform.left : c1 - transform.left] = shown
    result = torch.from_numpy(canvas)
    return result.flip(-1) if transform.flip else result


def transform_boxes(boxes: Tensor, transform: GeometricTransform) -> Tensor:
    """[n, 4] (left, top, right, bottom) in image pixels -> canvas pixels, clipped to the canvas."""
    (H, W), (h, w), side = transform.image, transform.resized, transform.canvas
    scale = boxes.new_tensor([w / W, h / H]).repeat(2)
    shift = boxes.new_tensor([transform.left, transform.top]).repeat(2)
    moved = boxes * scale - shift
    if transform.flip:
        left, top, right, bottom = moved.unbind(1)
        moved = torch.stack([side[1] - right, top, side[1] - left, bottom], dim=1)
    return clip_boxes(moved, side)


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """[n, 4] boxes clipped to an image of (height, width) pixels."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor([size[1], size[0], size[1], size[0]]))


def boxes_to_image(boxes: Tensor, transform: GeometricTransform) -> Tensor:
    """Inverse of :func:`transform_boxes` without flip: canvas pixels -> image pixels, clipped to the image."""
    (H, W), (h, w) = transform.image, transform.resized
    shift = boxes.new_tensor([transform.left, transform.top]).repeat(2)
    return clip_boxes((boxes + shift) * boxes.new_tensor([W / w, H / h]).repeat(2), transform.image)


def jitter_colors(image: Tensor, key: int) -> Tensor:
    """Random brightness, contrast, saturation and hue, each applied to half of the images (as in SSD, Liu et al. 2016).

    Brightness changes by up to 12.5 % of the range, contrast and saturation by up to one half, hue by up to 18
    degrees. Gray images have no saturation and hue; images without 1 or 3 channels are returned unchanged.

    Args:
        image: [C, h, w] uint8 or float32 on the 0..255 scale.
        key: key of the image.
    """
    from torchvision.transforms.v2 import functional as tv  # slow to import

    C = image.shape[0]
    if C not in (1, 3):
        return image
    u = (2 * uniform(hash64(STREAM_COLOR, key, torch.arange(4))) - 1).tolist()
    use = (hash64(STREAM_COLOR, key, torch.arange(4, 8)) < 0).tolist()
    x = image.float() / 255
    x = (x + 0.125 * u[0]).clamp(0, 1) if use[0] else x
    x = tv.adjust_contrast(x, 1 + 0.5 * u[1]) if use[1] else x
    if C == 3:
        x = tv.adjust_saturation(x, 1 + 0.5 * u[2]) if use[2] else x
        x = tv.adjust_hue(x, 0.05 * u[3]) if use[3] else x
    return (255 * x).round().to(torch.uint8) if image.dtype == torch.uint8 else 255 * x
