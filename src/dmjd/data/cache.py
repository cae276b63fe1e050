"""Small sets of images of one size, decoded once and kept in memory."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dmjd.data.sources.base import Source
from dmjd.data.unreadable import Report
from dmjd.data.workers import available_cores
from dmjd.images.stored import UnreadableImage

MAX_BYTES = 1 << 30

_PROBES = 32


@dataclass
class ImagesInMemory:
    """A decoded set.

    Attributes:
        images: [n, C, H, W] uint8 or float32 on the 0..255 scale; unreadable ones are zero.
        readable: [n] bool.
        unreadable: index -> (name, reason).
    """

    images: Tensor
    readable: Tensor
    unreadable: dict[int, Report] = field(default_factory=dict)


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """At most ``count`` different indices, evenly spaced over range(length), in order."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def first_of_parts(length: int, count: int) -> np.ndarray:
    """The first index of each of at most ``count`` equal parts of range(length), in order."""
    count = min(length, count)
    return np.arange(count) * length // count


def try_read(source: Source, index: int) -> np.ndarray | Report:
    """The image, or (name, reason) if it is unreadable."""
    try:
        return source.read(index)
    except UnreadableImage as error:
        return error.name, error.reason


def memory_needed(source: Source, max_pixels: int | None = None) -> int | None:
    """Bytes of the images of :func:`load_to_memory`, as far as a few tell; None if the set does not qualify."""
    kind = _kind_of(source, max_pixels)
    return None if kind is None else _num_bytes(len(source), *kind)


def _num_bytes(num_images: int, shape: tuple[int, ...], dtype: np.dtype) -> int:
    return num_images * math.prod(shape) * dtype.itemsize


def _kind_of(source: Source, max_pixels: int | None) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape [H, W, C] and type of a few evenly spaced images; None if they differ, or the set would be too large.

    None also for a set with invalid pixels: images with and without such are of different types.
    """
    if source.invalid is not None:
        return None
    probed = evenly_spaced(len(source), _PROBES).tolist()
    source.prepare(probed)
    probes = [try_read(source, i) for i in probed]
    kinds = {(p.shape, p.dtype) for p in probes if isinstance(p, np.ndarray)}
    if len(kinds) != 1:
        return None
    shape, dtype = kinds.pop()
    too_large = max_pixels is not None and max_pixels < shape[0] * shape[1]
    return None if too_large or _num_bytes(len(source), shape, dtype) > MAX_BYTES else (shape, dtype)


def load_to_memory(source: Source, max_pixels: int | None = None) -> ImagesInMemory | None:
    """Decode a set whose images have one size and type and take at most 1 GiB.

    Args:
        source: the set.
        max_pixels: largest size of an image in pixels; None: no limit.

    Returns:
        The images, or None if the set does not qualify. A few evenly spaced images are read first, which rejects
        most sets of large images or of images of different sizes quickly.
    """
    n, kind = len(source), _kind_of(source, max_pixels)
    if kind is None:
        return None
    (H, W, C), dtype = kind
    images = np.zeros((n, C, H, W), dtype)
    unreadable: dict[int, Report] = {}
    with ThreadPoolExecutor(available_cores()) as pool:
        indices = iter(range(n))
        while block := list(islice(indices, 1024)):  # in blocks, to stop soon at an image of another size
            source.prepare(block)
            for i, image in zip(block, pool.map(lambda i: try_read(source, i), block), strict=True):
                if not isinstance(image, np.ndarray):
                    unreadable[i] = image
                elif (image.shape, image.dtype) != ((H, W, C), dtype):
                    return None
                else:
                    images[i] = image.transpose(2, 0, 1)
    readable = torch.ones(n, dtype=torch.bool)
    readable[list(unreadable)] = False
    return ImagesInMemory(torch.from_numpy(images), readable, unreadable)
