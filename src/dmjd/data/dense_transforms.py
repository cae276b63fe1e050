"""Where an image lies in a frame of fixed size: random scale and place, flip and colors; masks and boxes follow it.

Everything drawn is a pure function of the image's key. Shapes: H, W image sides, h, w frame sides, C channels,
n boxes or instances of one image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmjd.data.transforms import flips
from dmjd.images.resampling import resize_box
from dmjd.rng import STREAM_COLOR, STREAM_PLACE, hash64, uniform

IGNORE = -1  # class of a pixel that counts in no loss and no metric

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """An image of ``image`` (H, W) pixels, resized to ``resized`` and looked at through a frame.

    Attributes:
        image, resized: (height, width). frame: (h, w) of the result.
        top, left: the frame's corner in the resized image; negative where the frame begins outside of it.
        flip: mirrored left to right.
    """

    image: Size
    resized: Size
    frame: Size
    top: int = 0
    left: int = 0
    flip: bool = False

    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the resized image that the frame shows: (first, behind the last) of each."""
        rows, columns = (
            (max(0, start), min(length, start + side))
            for start, length, side in zip((self.top, self.left), self.resized, self.frame, strict=True)
        )
        return rows, columns


def covering(image: Size, frame: Size) -> float:
    """The scale at which an image just covers a frame, keeping its proportions."""
    return max(frame[0] / image[0], frame[1] / image[1])


def fitting(image: Size, frame: Size) -> float:
    """The scale at which an image just fits into a frame, keeping its proportions."""
    return min(frame[0] / image[0], frame[1] / image[1])


def scaled(image: Size, scale: float) -> Size:
    """Whole sides of an image at a scale; at least one pixel each."""
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def random_placement(
    key: int, image: Size, frame: Size, base: float, scale: tuple[float, float], flip: bool
) -> Placement:
    """A random scale (uniform in ``base * scale``), place (uniform; all of a smaller image stays inside) and flip.

    Args:
        key: of the image. image, frame: (height, width). base: scale that ``scale`` multiplies.
        flip: whether one half of the images is mirrored.
    """
    u = uniform(hash64(STREAM_PLACE, key, torch.arange(3))).tolist()
    resized = scaled(image, base * (scale[0] + (scale[1] - scale[0]) * u[0]))
    top, left = (_offset(v, length - side) for v, length, side in zip(u[1:], resized, frame, strict=True))
    return Placement(image, resized, frame, top, left, flip and bool(flips(torch.tensor(key))))


def _offset(u: float, excess: int) -> int:
    """A whole number, uniform between 0 and ``excess`` (which may be negative), both included."""
    return math.floor(u * (excess + 1)) if excess >= 0 else -math.floor(u * (1 - excess))


def place_image(image: np.ndarray, placement: Placement, fill: tuple[float, ...]) -> Tensor:
    """[H, W, C] on the 0..255 scale -> [C, h, w] of the same type: bicubic, ``fill`` per channel outside."""
    (r0, r1), (c0, c1) = placement.spans()
    (H, W), (h, w) = placement.image, placement.resized
    part = resize_box(image, (r0 * H / h, c0 * W / w, (r1 - r0) * H / h, (c1 - c0) * W / w), (r1 - r0, c1 - c0))
    level = torch.tensor(fill, dtype=torch.float32)
    level = level.round().to(part.dtype) if part.dtype == torch.uint8 else level.to(part.dtype)
    canvas = level.view(-1, 1, 1).repeat(1, *placement.frame)
    canvas[:, r0 - placement.top : r1 - placement.top, c0 - placement.left : c1 - placement.left] = part
    return canvas.flip(-1) if placement.flip else canvas


def place_masks(masks: np.ndarray, placement: Placement, fill: int) -> Tensor:
    """[..., H, W] whole numbers -> [..., h, w] of the same type: nearest neighbor, ``fill`` outside."""
    (r0, r1), (c0, c1) = placement.spans()
    (H, W), (h, w) = placement.image, placement.resized
    rows = ((np.arange(r0, r1) + 0.5) * H / h).astype(np.int64)
    columns = ((np.arange(c0, c1) + 0.5) * W / w).astype(np.int64)
    canvas = np.full((*masks.shape[:-2], *placement.frame), fill, masks.dtype)
    shown = masks[..., rows[:, None], columns]
    canvas[..., r0 - placement.top : r1 - placement.top, c0 - placement.left : c1 - placement.left] = shown
    placed = torch.from_numpy(canvas)
    return placed.flip(-1) if placement.flip else placed


def place_boxes(boxes: Tensor, placement: Placement) -> Tensor:
    """[n, 4] (left, top, right, bottom) in image pixels -> the same in the frame, cut off at its edges."""
    (H, W), (h, w), side = placement.image, placement.resized, placement.frame
    scale = boxes.new_tensor([w / W, h / H]).repeat(2)
    shift = boxes.new_tensor([placement.left, placement.top]).repeat(2)
    moved = boxes * scale - shift
    if placement.flip:
        left, top, right, bottom = moved.unbind(1)
        moved = torch.stack([side[1] - right, top, side[1] - left, bottom], dim=1)
    return clip_boxes(moved, side)


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """[n, 4] boxes cut off at the edges of an image of (height, width) pixels."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor([size[1], size[0], size[1], size[0]]))


def boxes_to_image(boxes: Tensor, placement: Placement) -> Tensor:
    """Inverse of :func:`place_boxes` for a placement without flip: frame pixels -> image pixels, cut off there."""
    (H, W), (h, w) = placement.image, placement.resized
    shift = boxes.new_tensor([placement.left, placement.top]).repeat(2)
    return clip_boxes((boxes + shift) * boxes.new_tensor([W / w, H / h]).repeat(2), placement.image)


def jitter_colors(image: Tensor, key: int) -> Tensor:
    """Random brightness, contrast, saturation and hue, each in one half of the images (as SSD, Liu et al. 2016).

    Brightness changes by up to 12.5 % of the range, contrast and saturation by up to one half, hue by up to 18
    degrees; gray images have no saturation and hue, images of other than 1 or 3 channels are left as they are.

    Args:
        image: [C, h, w] uint8 or float32 on the 0..255 scale. key: of the image.
    """
    from torchvision.transforms.v2 import functional as tv  # takes a second to import

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
