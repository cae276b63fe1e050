"""Decode images of all supported formats to the values they store.

Arrays are [H, W, C] in the stored data type: 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha, or any number of channels.
"""

import io
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dmjd.images import dicom, jpeg, tiff
from dmjd.images.stored import MAX_PIXELS, Stored, UnreadableImage, check_pixels, upright
from dmjd.regular import irregular
from dmjd.text import printable

ImageLike = str | Path | bytes | BinaryIO | Image.Image | np.ndarray

_IMAGE_TYPES = (str, bytes, np.ndarray, Image.Image, os.PathLike, bytearray, memoryview)  # and binary files

NPY_MAGIC = b"\x93NUMPY"

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# Bit depth 16 with color, with alpha, or both: Pillow would reduce these to 8 bits.
_PNG_16_BITS = (b"\x10\x02", b"\x10\x04", b"\x10\x06")

_PNG_FEW_BITS = (b"\x02\x00", b"\x04\x00")  # gray

# What Pillow may decode. It knows others, some of which start programs (PostScript starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

_OPAQUE_MODES = {"1": "L", "L": "L", "RGB": "RGB", "RGBX": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


def open_stored(
    source: ImageLike, in_chans: int, value_range: tuple[float, float] | None = None
) -> Stored | jpeg.PlainJpeg:
    """The stored values, or a plain JPEG that is not decoded yet.

    Args:
        source: path, encoded bytes, binary file (read from its start), PIL image or array.
        in_chans: number of channels, used to find the channel axis of an array.
        value_range: given by the user; DICOM files have one of their own.

    Raises:
        UnreadableImage, or nearly any other exception, for damaged data; :func:`reason` describes it.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, in_chans)
    if isinstance(source, Image.Image):
        with jpeg.no_warnings():
            return _from_pil(source)
    frame = 1
    if isinstance(source, str | os.PathLike):
        source, frame = dicom.frame_of(source)
    with open_file(source) as file:
        head = file.read(32)
        file.seek(0)
        if dicom.is_dicom(file):
            return dicom.decode_dicom(file, frame, value_range)
        if frame > 1:
            raise UnreadableImage("", f"it is no DICOM file, and has no frame {frame}")
        if head.startswith(jpeg.START):
            plain = jpeg.plain_jpeg(file.read())
            if plain is not None and plain.height * plain.width <= MAX_PIXELS:
                return plain
            file.seek(0)
        with jpeg.no_warnings():
            return _decode(file, head, in_chans)


def open_file(source: str | Path | bytes | BinaryIO) -> BinaryIO:
    """Open a regular file, encoded bytes, or a binary file from its start.

    Raises:
        UnreadableImage: if a path is not a regular file; an OSError if it cannot be opened.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        if kind := irregular(source):
            raise UnreadableImage("", f"it is {kind}, not a file")
        return open(source, "rb")
    if source.seekable():
        source.seek(0)
    return io.BytesIO(source.read())


def is_image_like(value: object) -> bool:
    """Whether a value is one image, and not a sequence of some."""
    return isinstance(value, _IMAGE_TYPES) or (hasattr(value, "read") and hasattr(value, "seekable"))


def decode_plain(plain: jpeg.PlainJpeg, factor: int = 1) -> np.ndarray:
    """Decode a plain JPEG: [ceil(H / factor), ceil(W / factor), 1 or 3] uint8, contiguous.

    Raises the same errors as :func:`open_stored`.

    Args:
        plain: the image.
        factor: 1, 2, 4 or 8, the reduction of each side.
    """
    array = jpeg.decode(plain, factor)
    if array is not None:
        return array
    with jpeg.no_warnings(), Image.open(io.BytesIO(plain.data), formats=["JPEG"]) as image:
        image.draft(image.mode, (plain.width // factor, plain.height // factor))
        return np.ascontiguousarray(_from_pil(image).values)


def _decode(file: Any, head: bytes, in_chans: int) -> Stored:
    """Decode with the library that reads the format best."""
    if not head:
        raise UnreadableImage("", "the file is empty")
    if head.startswith(NPY_MAGIC):
        return _from_array(load_npy(file), in_chans)
    if is_png16(head):
        return decode_png16(file.read())
    if head.startswith(tiff.MAGIC):
        return tiff.decode_tiff(file, in_chans, _from_pil)
    with Image.open(file, formats=FORMATS) as image:
        if head.startswith(_PNG_MAGIC) and head[24:26] in _PNG_FEW_BITS and "transparency" in image.info:
            # Pillow spreads gray values of 2 and 4 bits over 0..255, but not the value that is transparent.
            image.info["transparency"] *= 255 // (2 ** head[24] - 1)
        return _from_pil(image)


def _from_pil(image: Image.Image) -> Stored:
    """Upright gray or RGB with or without alpha; uint8, uint16, int32 or float32."""
    check_pixels(image.height, image.width)
    image.load()  # some formats store transparency and rotation after the pixels
    alpha = False
    if image.mode.startswith(("I", "F")):  # 16-bit gray, integers and floats: read as stored
        array = np.asarray(image)
        if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
            array = array.astype(np.uint16)  # Pillow opens some 16-bit files as 32-bit integers
        if array.dtype == np.uint16 and isinstance(clear := image.info.get("transparency"), int):
            array, alpha = np.stack([array, np.where(array == clear, 0, 65535).astype(np.uint16)], axis=-1), True
    else:
        mode = _plain_mode(image)
        array, alpha = np.asarray(image if image.mode == mode else image.convert(mode)), mode in ("LA", "RGBA")
    array = upright(array, jpeg.orientation(image))
    return Stored(array[:, :, None] if array.ndim == 2 else array, alpha)


def _plain_mode(image: Image.Image) -> str:
    """The gray or RGB mode, with alpha if the image has it, that holds an 8-bit image without loss."""
    if image.has_transparency_data:
        return "LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"
    return _OPAQUE_MODES.get(image.mode, "RGB")


def is_png16(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a 16-bit PNG with color or alpha."""
    return head.startswith(_PNG_MAGIC) and head[24:26] in _PNG_16_BITS


def decode_png16(data: bytes) -> Stored:
    """Decode a 16-bit PNG with color or alpha: [H, W, 2, 3 or 4] uint16."""
    from torchvision.io import ImageReadMode, decode_png  # takes seconds to import and is rarely needed

    check_pixels(*struct.unpack(">II", data[16:24]))
    with Image.open(io.BytesIO(data), formats=["PNG"]) as header:  # not decoded
        orientation, clear = jpeg.orientation(header), header.info.get("transparency")
    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    values = pixels.permute(1, 2, 0).numpy()
    alpha = values.shape[2] in (2, 4)
    if isinstance(clear, tuple) and not alpha:
        opaque = np.where((values == np.array(clear)).all(-1, keepdims=True), 0, 65535).astype(np.uint16)
        values, alpha = np.concatenate([values, opaque], axis=-1), True
    return Stored(upright(values, orientation), alpha)


def load_npy(file: BinaryIO) -> np.ndarray:
    """Load an ``.npy`` file, unless its header promises more than the file holds, for which memory would be taken."""
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(file)
    start, end = file.tell(), file.seek(0, io.SEEK_END)
    if math.prod(shape) * dtype.itemsize > end - start:
        raise UnreadableImage("", f"an array of shape {tuple(shape)} whose end is missing")
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _from_array(array: np.ndarray, in_chans: int) -> Stored:
    """An array of the caller's; the second of two and the fourth of four channels are alpha."""
    values = _channels_last(array, in_chans)
    return Stored(values, values.shape[2] in (2, 4))


def _channels_last(array: np.ndarray, in_chans: int) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] -> [H, W, C]. Channels are the axis of length in_chans, else the shorter one."""
    if array.ndim not in (2, 3):
        raise UnreadableImage("", f"array of shape {tuple(array.shape)}; expected [H, W], [H, W, C] or [C, H, W]")
    if array.size == 0:
        raise UnreadableImage("", f"array of shape {tuple(array.shape)}: the image is empty")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] != in_chans and (array.shape[0] == in_chans or array.shape[0] < array.shape[2]):
        array = array.transpose(1, 2, 0)
    check_pixels(array.shape[0], array.shape[1])
    return array


def reason(error: Exception) -> str:
    """Describe an error of a decoder or the file system in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {MAX_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    text = printable(" ".join(str(error).split()))
    return f"damaged or unsupported ({text[:120] or type(error).__name__})"
