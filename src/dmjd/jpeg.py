"""The common JPEG, fast: 8-bit, grey or colour, stored upright. Pillow reads all others, and says what is wrong.

Its size is known before it is decoded, so that a loader can choose a crop first, keep only encoded pictures waiting,
and decode a picture much larger than its crop is to become at a fraction of its size.
"""

import io
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

START = b"\xff\xd8\xff"
_START_OF_SCAN, _APP1 = 0xFFDA, 0xFFE1
_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended, progressive; the rest is lossless or arithmetic
_ORIENTATION = 0x0112
# What is left to the resampling after a reduction: at 2 the two ways differ by less than JPEG itself did.
_GAP = 2


class PlainJpeg(NamedTuple):
    """An encoded picture that :func:`decode` can read, and its size in pixels."""

    data: bytes
    height: int
    width: int


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The picture, or None for what is not a JPEG, or not 8-bit, grey or colour and upright."""
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


def _plain_frame(header: bytes) -> tuple[int, int] | None:
    """(H, W) from the head of a frame, or None: 8 bits, 1 or 3 components."""
    if len(header) < 6:
        return None
    bits, height, width, components = struct.unpack(">BHHB", header)
    return (height, width) if bits == 8 and components in (1, 3) and height * width > 0 else None


def _is_turned(data: bytes) -> bool:
    """Whether EXIF or XMP name a rotation, by Pillow's own reading of them."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return orientation(image) != 1
    except Exception:  # then Pillow is to say what is wrong
        return True


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright; damaged EXIF data costs the rotation, not the picture."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def decode(jpeg: PlainJpeg) -> np.ndarray | None:
    """[H, W, 1 or 3] uint8, contiguous, the same pixels as Pillow's; None where that is left to Pillow.

    torchvision decodes without Pillow's copies, a fifth faster: `benchmarks/loader.py`.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # seconds to import

        encoded = torch.frombuffer(bytearray(jpeg.data), dtype=torch.uint8)
        pixels = decode_jpeg(encoded, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    except Exception:  # damaged data, or a torchvision built without JPEG
        return None
    expected = pixels.shape[:2] == (jpeg.height, jpeg.width) and pixels.shape[2] in (1, 3)
    return np.ascontiguousarray(pixels) if expected else None


def reduction(box: Sequence[float], size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: how far a picture may shrink while being decoded if its ``box`` (top, left, h, w) becomes ``size``.

    The box stays at least twice as large as what it is resized to.
    """
    room = min(box[2] / size[0], box[3] / size[1]) / _GAP
    return 1 << min(3, max(0, math.floor(math.log2(room)))) if room >= 1 else 1


def decode_reduced(jpeg: PlainJpeg, factor: int) -> np.ndarray:
    """[ceil(H / factor), ceil(W / factor), 1 or 3] uint8: fewer frequencies are decoded, Pillow's ``draft``.

    Raises:
        OSError: for damaged data.
    """
    with Image.open(io.BytesIO(jpeg.data)) as image:
        image.draft(image.mode, (jpeg.width // factor, jpeg.height // factor))
        array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array
