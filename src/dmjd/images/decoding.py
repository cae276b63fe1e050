"""Decode images of all supported formats to the values they store.

Arrays are [H, W, C] in the stored data type: 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha, or any number of channels.
"""

import io
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dmjd.images import jpeg

MAX_PIXELS = 178_956_970  # larger images are taken for decompression bombs, as in Pillow

ImageLike = str | Path | bytes | Image.Image | np.ndarray

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders

_NPY_MAGIC = b"\x93NUMPY"

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_OPAQUE_MODES = {"1": "L", "L": "L", "RGB": "RGB", "RGBX": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


class UnreadableImage(ValueError):  # noqa: N818, the name is clear without "Error"
    """An image that cannot be used, with its ``name`` and the ``reason`` in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both are arguments, so that the exception can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_stored(source: ImageLike, in_chans: int) -> np.ndarray | jpeg.PlainJpeg:
    """The stored values [H, W, C] in the stored data type, or a plain JPEG that is not decoded yet.

    Args:
        source: path, encoded bytes, PIL image or array.
        in_chans: number of channels, used to find the channel axis of an array.

    Raises:
        UnreadableImage, or nearly any other exception, for damaged data; :func:`reason` describes it.
    """
    if isinstance(source, np.ndarray):
        return _channels_last(source, in_chans)
    if isinstance(source, Image.Image):
        with jpeg.no_warnings():
            return _from_pil(source)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        head = file.read(32)
        file.seek(0)
        if head.startswith(jpeg.START):
            plain = jpeg.plain_jpeg(file.read())
            if plain is not None and plain.height * plain.width <= MAX_PIXELS:
                return plain
            file.seek(0)
        with jpeg.no_warnings():
            return _decode(file, head, in_chans)


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
    with jpeg.no_warnings(), Image.open(io.BytesIO(plain.data)) as image:
        image.draft(image.mode, (plain.width // factor, plain.height // factor))
        return np.ascontiguousarray(_from_pil(image))


def _decode(file: Any, head: bytes, in_chans: int) -> np.ndarray:
    """Decode with the library that reads the format best."""
    if not head:
        raise UnreadableImage("", "the file is empty")
    if head.startswith(_NPY_MAGIC):
        return _channels_last(np.load(file, allow_pickle=False), in_chans)
    if head.startswith(_PNG_MAGIC) and head[24:26] in (b"\x10\x02", b"\x10\x06"):
        return _decode_png16(file.read())
    if head.startswith(_TIFF_MAGIC):
        return _decode_tiff(file, in_chans)
    with Image.open(file) as image:
        return _from_pil(image)


def _check_pixels(height: int, width: int) -> None:
    """Refuse empty images, and decompression bombs before they are decoded."""
    if height * width > MAX_PIXELS:
        raise UnreadableImage("", f"{height} x {width} pixels, more than {MAX_PIXELS:,}")
    if height * width == 0:
        raise UnreadableImage("", f"{height} x {width} pixels: the image is empty")


def _from_pil(image: Image.Image) -> np.ndarray:
    """[H, W, C] upright: 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha; uint8, uint16, int32 or float32."""
    _check_pixels(image.height, image.width)
    image.load()  # some formats store transparency and rotation after the pixels
    if image.mode.startswith(("I", "F")):  # 16-bit gray, integers and floats: read as stored
        array = np.asarray(image)
        if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
            array = array.astype(np.uint16)  # Pillow opens some 16-bit files as 32-bit integers
    else:
        mode = _plain_mode(image)
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    array = _UPRIGHT.get(jpeg.orientation(image), lambda a: a)(array)
    return array[:, :, None] if array.ndim == 2 else array


def _plain_mode(image: Image.Image) -> str:
    """The gray or RGB mode, with alpha if the image has it, that holds an 8-bit image without loss."""
    if image.has_transparency_data:
        return "LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"
    return _OPAQUE_MODES.get(image.mode, "RGB")


_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def _decode_png16(data: bytes) -> np.ndarray:
    """Decode a 16-bit color PNG, which Pillow would reduce to 8 bits: [H, W, 3 or 4] uint16."""
    from torchvision.io import ImageReadMode, decode_png  # takes seconds to import and is rarely needed

    _check_pixels(*struct.unpack(">II", data[16:24]))
    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels.permute(1, 2, 0).numpy()


def _decode_tiff(file: Any, in_chans: int) -> np.ndarray:
    """Decode with Pillow if 8-bit or gray, else with tifffile: Pillow would reduce to 8 bits or 4 channels."""
    if in_chans in (1, 3, 4):
        try:
            with Image.open(file) as image:
                samples, bits = image.tag_v2.get(277, 1), max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
                if samples == 1 or (samples <= 4 and bits <= 8):
                    return _from_pil(image)
        except UnidentifiedImageError:
            pass
    import tifffile  # slow to import and rarely needed

    file.seek(0)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs every unusual tag; errors are raised anyway
    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        sides = dict(zip(series.axes, series.shape, strict=True))
        _check_pixels(sides.get("Y", 1), sides.get("X", 1))
        array = series.asarray()
    return _channels_last(array[0] if array.ndim == 4 else array, in_chans)


def _channels_last(array: np.ndarray, in_chans: int) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] -> [H, W, C]. Channels are the axis of length in_chans, else the shorter one."""
    if array.ndim not in (2, 3):
        raise UnreadableImage("", f"array of shape {tuple(array.shape)}; expected [H, W], [H, W, C] or [C, H, W]")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] != in_chans and (array.shape[0] == in_chans or array.shape[0] < array.shape[2]):
        array = array.transpose(1, 2, 0)
    _check_pixels(array.shape[0], array.shape[1])
    return array


def reason(error: Exception) -> str:
    """Describe an error of a decoder or the file system in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {MAX_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())
    return f"damaged or unsupported ({text[:120] or type(error).__name__})"
