"""Fast decoding of plain JPEGs: 8-bit, gray or color, stored upright. Pillow decodes, or rejects, all others.

The size is known before decoding, so a loader can choose a crop first, queue encoded images, and decode large images at
a fraction of their size.
"""

import contextlib
import io
import math
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

START = b"\xff\xd8\xff"

_START_OF_SCAN, _APP1 = 0xFFDA, 0xFFE1

_START_OF_FRAME = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended, progressive; others are lossless or arithmetic

_ORIENTATION = 0x0112

# Resizing factor left after a reduced decoding: with 2, the difference from full decoding is below JPEG's own error.
_REMAINING_FACTOR = 2


class PlainJpeg(NamedTuple):
    """An encoded image that :func:`decode` can read, with its size in pixels and 1 or 3 channels."""

    data: bytes
    height: int
    width: int
    channels: int


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """Parse the header of a JPEG; None if it is not a JPEG, or not plain (see the module)."""
    if not data.startswith(START):
        return None
    position, frame, may_be_rotated = 2, None, False
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == _START_OF_SCAN:
            plain = frame is not None and not (may_be_rotated and _is_rotated(data))
            return PlainJpeg(data, *frame) if plain and frame else None
        if marker in _START_OF_FRAME:
            frame = _plain_frame(data[position + 4 : position + 10])
        elif marker >> 8 != 0xFF:
            return None
        may_be_rotated = may_be_rotated or marker == _APP1
        position += 2 + length
    return None


def _plain_frame(header: bytes) -> tuple[int, int, int] | None:
    """(H, W, C) from a frame header; None unless it has 8 bits and 1 or 3 components."""
    if len(header) < 6:
        return None
    bits, height, width, components = struct.unpack(">BHHB", header)
    return (height, width, components) if bits == 8 and components in (1, 3) and height * width > 0 else None


def _is_rotated(data: bytes) -> bool:
    """Whether EXIF or XMP contain a rotation, as Pillow reads them."""
    try:
        with no_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return orientation(image) != 1
    except Exception:  # let Pillow decode it, and report what is wrong
        return True


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 = upright; also 1 if the EXIF data are damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def decode(jpeg: PlainJpeg, factor: int = 1) -> np.ndarray | None:
    """Decode to [ceil(H / factor), ceil(W / factor), 1 or 3] uint8, the same pixels as Pillow; None if it must decode.

    simplejpeg makes no copies and is a quarter faster than Pillow; torchvision prints warnings about damage to stderr
    (`benchmarks/speed/loader.py`).

    Args:
        jpeg: the image.
        factor: 1, 2, 4 or 8; above 1 fewer frequencies are decoded.
    """
    smallest = {} if factor == 1 else {"min_height": -(-jpeg.height // factor), "min_width": -(-jpeg.width // factor)}
    try:
        import simplejpeg  # not available on every platform

        return simplejpeg.decode_jpeg(jpeg.data, "GRAY" if jpeg.channels == 1 else "RGB", **smallest)
    except (ImportError, ValueError):  # ValueError: damaged data, which Pillow may still decode in part
        return None


def reduction(box: Sequence[float], size: tuple[int, int]) -> int:
    """Largest factor (1, 2, 4, 8) of a reduced decoding, if ``box`` (top, left, h, w) is to be resized to ``size``.

    The reduced box is at least twice as large as ``size``.
    """
    room = min(box[2] / size[0], box[3] / size[1]) / _REMAINING_FACTOR
    return 1 << min(3, max(0, math.floor(math.log2(room)))) if room >= 1 else 1


_warnings_lock = threading.Lock()

_silenced = 0

_saved_filters: warnings.catch_warnings | None = None


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Silence warnings of decoders. Threads may overlap: the first one sets the filter, the last one restores it."""
    global _silenced, _saved_filters
    with _warnings_lock:
        if _silenced == 0:
            _saved_filters = warnings.catch_warnings()
            _saved_filters.__enter__()
            warnings.simplefilter("ignore")
        _silenced += 1
    try:
        yield
    finally:
        with _warnings_lock:
            _silenced -= 1
            if _silenced == 0 and _saved_filters is not None:
                _saved_filters.__exit__(None, None, None)
