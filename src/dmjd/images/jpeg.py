"""The common JPEG, fast: 8-bit, gray or color, stored upright. Pillow reads all others, and says what is wrong.

Its size is known before it is decoded, so that a loader can choose a crop first, keep only encoded images waiting,
and decode an image much larger than its crop is to become at a fraction of its size.
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

_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended, progressive; the rest is lossless or arithmetic

_ORIENTATION = 0x0112

# What is left to the resampling after a reduction: at 2 the two ways differ by less than JPEG itself did.
_GAP = 2


class PlainJpeg(NamedTuple):
    """An encoded image that :func:`decode` can read, its size in pixels, and 1 or 3 channels."""

    data: bytes
    height: int
    width: int
    channels: int


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The image, or None for what is not a JPEG, or not 8-bit, gray or color and upright."""
    if not data.startswith(START):
        return None
    place, frame, may_turn = 2, None, False
    while place + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, place)
        if marker == _START_OF_SCAN:
            plain = frame is not None and not (may_turn and _is_turned(data))
            return PlainJpeg(data, *frame) if plain and frame else None
        if marker in _FRAMES:
            frame = _plain_frame(data[place + 4 : place + 10])
        elif marker >> 8 != 0xFF:
            return None
        may_turn = may_turn or marker == _APP1
        place += 2 + length
    return None


def _plain_frame(header: bytes) -> tuple[int, int, int] | None:
    """(H, W, C) from the head of a frame, or None: 8 bits, 1 or 3 components."""
    if len(header) < 6:
        return None
    bits, height, width, components = struct.unpack(">BHHB", header)
    return (height, width, components) if bits == 8 and components in (1, 3) and height * width > 0 else None


def _is_turned(data: bytes) -> bool:
    """Whether EXIF or XMP name a rotation, by Pillow's own reading of them."""
    try:
        with no_warnings(), Image.open(io.BytesIO(data)) as image:
            return orientation(image) != 1
    except Exception:  # then Pillow is to say what is wrong
        return True


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright; damaged EXIF data costs the rotation, not the image."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def decode(jpeg: PlainJpeg, factor: int = 1) -> np.ndarray | None:
    """[ceil(H / factor), ceil(W / factor), 1 or 3] uint8, the same pixels as Pillow's; None where it is left to Pillow.

    simplejpeg decodes without Pillow's copies, a quarter faster, and without a word on stderr about damage, as
    torchvision has it: `benchmarks/speed/loader.py`.

    Args:
        jpeg: what to decode. factor: 1, 2, 4 or 8; above 1 fewer frequencies are decoded.
    """
    smallest = {} if factor == 1 else {"min_height": -(-jpeg.height // factor), "min_width": -(-jpeg.width // factor)}
    try:
        import simplejpeg  # not on every platform

        return simplejpeg.decode_jpeg(jpeg.data, "GRAY" if jpeg.channels == 1 else "RGB", **smallest)
    except (ImportError, ValueError):  # ValueError: damaged data, of which Pillow may still show some
        return None


def reduction(box: Sequence[float], size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: how far an image may shrink while being decoded if its ``box`` (top, left, h, w) becomes ``size``.

    The box stays at least twice as large as what it is resized to.
    """
    room = min(box[2] / size[0], box[3] / size[1]) / _GAP
    return 1 << min(3, max(0, math.floor(math.log2(room)))) if room >= 1 else 1


_warnings_lock = threading.Lock()

_warnings_readers = 0

_warnings_saved: warnings.catch_warnings | None = None


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Silence decoders' warnings. ``catch_warnings`` alone breaks when threads overlap: the last one out restores."""
    global _warnings_readers, _warnings_saved
    with _warnings_lock:
        if _warnings_readers == 0:
            _warnings_saved = warnings.catch_warnings()
            _warnings_saved.__enter__()
            warnings.simplefilter("ignore")
        _warnings_readers += 1
    try:
        yield
    finally:
        with _warnings_lock:
            _warnings_readers -= 1
            if _warnings_readers == 0 and _warnings_saved is not None:
                _warnings_saved.__exit__(None, None, None)
