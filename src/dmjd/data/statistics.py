"""Statistics of a set: mean and standard deviation of its channels, typical size of its images."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dmjd.data.cache import evenly_spaced, try_read
from dmjd.data.sources.base import Source
from dmjd.data.workers import available_cores
from dmjd.images.decoding import open_stored
from dmjd.images.invalid import has_invalid
from dmjd.images.resampling import resize_box
from dmjd.images.stored import Stored
from dmjd.warning import DMJDWarning

_LONGEST_SIDE = 64

_SMALLEST_STD = 1 / 255  # so that normalizing does not amplify a constant channel

_NARROW = 255 / 8  # of the 0..255 scale; images that use less are nearly uniform to an encoder


class Stats(NamedTuple):
    """Mean and std per channel on the 0..1 scale, and a warning if the images use little of their range."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    warning: str | None


def measure_stats(source: Source, sample: int = 2048) -> Stats:
    """Mean and standard deviation over the pixels of evenly spaced images of a set; each image has the same weight.
    Invalid pixels are left out.

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
    mean, square = _over_images([m.mean for m in good]), _over_images([m.square for m in good])
    variance = square - mean**2
    std = np.sqrt(variance.clip(min=0)).clip(min=_SMALLEST_STD)
    # Rounded, since they are written into every checkpoint and further digits are noise.
    numbers = [tuple(round(float(x), 5) for x in values) for values in (mean, std)]
    return Stats(numbers[0], numbers[1], range_warning(source))


def typical_size(source: Source, sample: int = 5) -> tuple[int, int] | None:
    """Median (height, width) in pixels of a few evenly spaced images of a set; None if none can be read."""
    images = [try_read(source, int(i)) for i in evenly_spaced(len(source), sample)]
    shapes = [image.shape[:2] for image in images if isinstance(image, np.ndarray)]
    if not shapes:
        return None
    height, width = np.median(shapes, axis=0)
    return int(height), int(width)


class _Moments(NamedTuple):
    """[C] mean and mean square of an image on the 0..1 scale."""

    mean: np.ndarray
    square: np.ndarray


def _moments(source: Source, index: int) -> "_Moments | tuple[str, str]":
    image = try_read(source, index)
    if not isinstance(image, np.ndarray):
        return image
    values = _small(image).double() / 255
    if has_invalid(image):
        return _Moments(values.nanmean((1, 2)).numpy(), values.square().nanmean((1, 2)).numpy())
    return _Moments(values.mean((1, 2)).numpy(), values.square().mean((1, 2)).numpy())


def _over_images(moments: list[np.ndarray]) -> np.ndarray:
    """The mean over images [C]; those that have no valid value in a channel are left out of it."""
    stacked = np.stack(moments)
    known = np.isfinite(stacked)
    if known.all():
        return np.mean(moments, axis=0)
    return np.where(known, stacked, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def _small(image: np.ndarray) -> Tensor:
    """[C, h, w] with no side above 64 pixels."""
    H, W = image.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(H, W))
    return resize_box(image, (0, 0, H, W), (max(1, round(H * scale)), max(1, round(W * scale))))


def range_warning(source: Source, sample: int = 32) -> str | None:
    """A warning with a better value range, if the values of evenly spaced images fill little of theirs.

    Examples are 12-bit values in 16-bit files, which would be nearly black.

    Args:
        source: the set.
        sample: largest number of images to read.
    """
    used = _little_used(source, sample)
    if used is None:
        return None
    given = [f"{x:g}" for x in used.rounded]
    return (
        f"{used.text}: if that is all they use, pass --value-range {' '.join(given)}, "
        "the values that become black and white"
    )


def warn_of_range(source: Source) -> None:
    """Warn, as :func:`range_warning`, about images for a trained encoder, whose value range is given."""
    if (used := _little_used(source, 32)) is not None:
        warnings.warn(
            f"{used.text}, which the encoder takes: if the images it was trained on used more, scale these like them",
            DMJDWarning,
            stacklevel=3,
        )


class _Used(NamedTuple):
    """In words, the values that images use of their range; and the range of round numbers around them."""

    text: str
    rounded: tuple[float, float]


def _little_used(source: Source, sample: int) -> _Used | None:
    """What evenly spaced images use of their range, if that is little."""
    indices = [int(i) for i in evenly_spaced(len(source), sample)]
    with ThreadPoolExecutor(available_cores()) as pool:
        read = list(pool.map(lambda i: try_read(source, i), indices))
    good = [(index, image) for index, image in zip(indices, read, strict=True) if isinstance(image, np.ndarray)]
    ends = [(float(np.nanmin(image)), float(np.nanmax(image))) for _, image in good]
    smallest, largest = min((lo for lo, _ in ends), default=0.0), max((hi for _, hi in ends), default=255.0)
    if largest - smallest >= _NARROW or largest == smallest:
        return None
    whole, integers = _whole_range(source, good[0][0])
    lo, hi = (whole[0] + end / 255 * (whole[1] - whole[0]) for end in (smallest, largest))
    text = (
        f"the values of {len(good)} images of {source.name} lie between {lo:.5g} and {hi:.5g}, "
        f"{(largest - smallest) / 255:.1%} of the range from {whole[0]:g} to {whole[1]:g}"
    )
    return _Used(text, _rounded(lo, hi, integers))


def _whole_range(source: Source, index: int) -> tuple[tuple[float, float], bool]:
    """The stored values that become 0 and 255, and whether they are integers."""
    stored = open_stored(source.stored(index), source.in_chans)
    dtype = stored.values.dtype if isinstance(stored, Stored) else np.dtype(np.uint8)
    integers = dtype.kind in "iu"
    natural = (0.0, float(np.iinfo(dtype).max)) if integers else (0.0, 1.0)
    natural = (stored.value_range if isinstance(stored, Stored) else None) or natural
    return source.value_range or natural, integers


def _rounded(lo: float, hi: float, integers: bool) -> tuple[float, float]:
    """A range around (lo, hi) of round numbers; from 0 to a power of two for integers that begin near 0."""
    from_zero = 0 <= lo < (hi - lo)
    if integers:
        lo, hi = float(np.floor(lo + 1e-3)), float(np.ceil(hi - 1e-3))
        return (0.0, 2.0 ** int(hi).bit_length() - 1) if from_zero else (lo, hi)
    step = 10.0 ** np.floor(np.log10(hi - lo) - 1)
    return (0.0 if from_zero else float(np.floor(lo / step) * step)), float(np.ceil(hi / step - 1e-3) * step)
