"""Statistics of a set: mean and standard deviation of its channels, typical size of its images."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dmjd.data.cache import evenly_spaced, try_read
from dmjd.data.sources.base import Source
from dmjd.data.workers import available_cores
from dmjd.images.resampling import resize_box

_LONGEST_SIDE = 64

_SMALLEST_STD = 1 / 255  # so that normalizing does not amplify a constant channel

_DARK = 255 / 8


class Stats(NamedTuple):
    """Mean and std per channel on the 0..1 scale, and a warning if the images use little of their range."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    warning: str | None


def measure_stats(source: Source, sample: int = 2048) -> Stats:
    """Mean and standard deviation over the pixels of evenly spaced images of a set; each image has the same weight.

    Args:
        source: the set.
        sample: largest number of images to read; each is resized to at most 64 pixels.

    Raises:
        ValueError: if none of them can be read.
    """
    with ThreadPoolExecutor(available_cores()) as pool:
        results = list(pool.map(lambda i: _moments(source, int(i)), evenly_spaced(len(source), sample)))
    good = [r for r in results if isinstance(r, _Moments)]
    if not good:
        name, reason = next(r for r in results if not isinstance(r, _Moments))
        raise ValueError(f"none of {len(results)} images of {source.name} can be read; {name}: {reason}")
    mean = np.mean([m.mean for m in good], axis=0)
    variance = np.mean([m.square for m in good], axis=0) - mean**2
    std = np.sqrt(variance.clip(min=0)).clip(min=_SMALLEST_STD)
    # Rounded, since they are written into every checkpoint and further digits are noise.
    numbers = [tuple(round(float(x), 5) for x in values) for values in (mean, std)]
    return Stats(numbers[0], numbers[1], _range_warning(source, good))


def typical_size(source: Source, sample: int = 5) -> tuple[int, int] | None:
    """Median (height, width) in pixels of a few evenly spaced images of a set; None if none can be read."""
    images = [try_read(source, int(i)) for i in evenly_spaced(len(source), sample)]
    shapes = [image.shape[:2] for image in images if isinstance(image, np.ndarray)]
    if not shapes:
        return None
    height, width = np.median(shapes, axis=0)
    return int(height), int(width)


class _Moments(NamedTuple):
    """One image: [C] mean and mean square on the 0..1 scale, its largest value on 0..255, whether it is 8-bit."""

    mean: np.ndarray
    square: np.ndarray
    largest: float
    eight_bit: bool


def _moments(source: Source, index: int) -> "_Moments | tuple[str, str]":
    image = try_read(source, index)
    if not isinstance(image, np.ndarray):
        return image
    values = _small(image).double() / 255
    return _Moments(
        values.mean((1, 2)).numpy(),
        values.square().mean((1, 2)).numpy(),
        float(image.max()),
        image.dtype == np.uint8,
    )


def _small(image: np.ndarray) -> Tensor:
    """[C, h, w] with no side above 64 pixels."""
    H, W = image.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(H, W))
    return resize_box(image, (0, 0, H, W), (max(1, round(H * scale)), max(1, round(W * scale))))


def _range_warning(source: Source, moments: list[_Moments]) -> str | None:
    largest = max((m.largest for m in moments if not m.eight_bit), default=None)
    if largest is None or largest >= _DARK:
        return None
    return (
        f"the images of {source.name} are not 8-bit and use only {largest / 255:.1%} of their range: "
        "give value_range=(lo, hi), the stored values that become black and white"
    )
