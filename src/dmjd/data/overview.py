"""What a set of images is like, from a sample: number, sizes, gray, unreadable and nearly equal images."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np

from dmjd.data.cache import first_of_parts, try_read
from dmjd.data.sources.base import Source
from dmjd.data.workers import available_cores
from dmjd.images.resampling import resize_box

_PAIRS = 128  # of images that are neighbors in the set

_BLOCK, _ROUNDS = 16, 8  # pairs that are read before the clock is looked at, and passes over the set

_SIDE = 16  # of the thumbnails that are compared, in pixels

_NEARLY_EQUAL = 0.02  # mean difference of the thumbnails, relative to the range of values


@dataclass(frozen=True)
class Overview:
    """A set of images.

    Attributes:
        num_images: images in the set.
        sampled: images that were read.
        smallest, typical, largest: (height, width) in pixels of the sampled images; by area, and the medians.
        gray: fraction of the sampled images whose channels are all equal; 0 for a single channel.
        unreadable: fraction of the sampled images that cannot be read.
        neighbors_alike: fraction of images that are nearly equal to the next one of the set, as frames of a video are.
        example: name of an unreadable image, and why it is; None if there is none.
    """

    num_images: int
    sampled: int
    smallest: tuple[int, int]
    typical: tuple[int, int]
    largest: tuple[int, int]
    gray: float
    unreadable: float
    neighbors_alike: float
    example: str | None = None


def overview(source: Source, seconds: float = 10.0) -> Overview:
    """Read up to 256 images of a set, in evenly spaced pairs of neighbors.

    Args:
        source: the set.
        seconds: time after which no more images are read.

    Raises:
        ValueError: if none can be read.
    """
    first = first_of_parts(len(source), _PAIRS)
    pairs = [[i, i + 1] if i + 1 < len(source) else [i] for i in first.tolist()]
    pairs = [pair for k in range(_ROUNDS) for pair in pairs[k::_ROUNDS]]  # the first ones cover the whole set
    looks: dict[int, _Look | tuple[str, str]] = {}  # by index: in a small set, pairs share images
    started = time.monotonic()
    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(pairs), _BLOCK):
            if looks and time.monotonic() - started >= seconds:
                break
            new = sorted({i for pair in pairs[start : start + _BLOCK] for i in pair} - looks.keys())
            looks |= zip(new, pool.map(lambda i: _look(source, i), new), strict=True)
    good = {i: look for i, look in looks.items() if isinstance(look, _Look)}
    name, reason = next((look for look in looks.values() if not isinstance(look, _Look)), ("", ""))
    if not good:
        raise ValueError(f"none of {len(looks)} images of {source.name} can be read; {name}: {reason}")
    sizes = sorted((look.size for look in good.values()), key=lambda size: size[0] * size[1])
    compared = [(good[a], good[b]) for a, b in (p for p in pairs if len(p) == 2) if a in good and b in good]
    alike = [np.abs(a.thumbnail - b.thumbnail).mean() < 255 * _NEARLY_EQUAL for a, b in compared]
    return Overview(
        num_images=len(source),
        sampled=len(looks),
        smallest=sizes[0],
        typical=(int(median(h for h, _ in sizes)), int(median(w for _, w in sizes))),
        largest=sizes[-1],
        gray=sum(look.gray for look in good.values()) / len(good),
        unreadable=1 - len(good) / len(looks),
        neighbors_alike=sum(alike) / len(alike) if alike else 0.0,
        example=f"{name}: {reason}" if name else None,
    )


@dataclass(frozen=True)
class _Look:
    """Size, whether it is gray, and a thumbnail [16, 16, C] of an image."""

    size: tuple[int, int]
    gray: bool
    thumbnail: np.ndarray


def _look(source: Source, index: int) -> "_Look | tuple[str, str]":
    image = try_read(source, index)
    if not isinstance(image, np.ndarray):
        return image
    H, W, C = image.shape
    gray = C > 1 and bool((image == image[..., :1]).all())
    thumbnail = resize_box(image, (0, 0, H, W), (_SIDE, _SIDE)).float().numpy()
    return _Look((H, W), gray, thumbnail)
