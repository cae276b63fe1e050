"""Decode segmentation masks: the number of each pixel exactly as stored, whatever colors it stands for."""

from typing import Any

import numpy as np
from PIL import Image

from dmjd.images import jpeg, tiff
from dmjd.images.decoding import NPY_MAGIC, ImageLike, decode_png16, is_png16, load_npy, open_file, reason
from dmjd.images.stored import UnreadableImage, check_pixels, upright

FORMATS = ("PNG", "BMP", "GIF", "JPEG", "WEBP")  # the last two to say why not; TIFF and .npy have their own decoders

_LOSSY = ("JPEG", "WEBP")

_MOST_NUMBERS = 1 << 16


def read_mask(stored: ImageLike, name: str) -> np.ndarray:
    """Decode a mask: [H, W] of integers from 0 to 65535, upright. The colors of a palette are ignored.

    Raises:
        UnreadableImage: unless it holds one number per pixel.
    """
    try:
        array = _numbers(stored)
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    except Exception as error:  # decoders raise nearly every built-in exception
        raise UnreadableImage(name, reason(error)) from None
    if array.ndim == 3 and (array[..., :1] == array[..., : min(3, array.shape[2])]).all():
        array = array[..., 0]  # one number in three equal channels
    if array.ndim != 2:
        raise UnreadableImage(name, "it is in color: a mask needs one number per pixel, as in a gray or palette PNG")
    if array.size == 0:
        raise UnreadableImage(name, "the mask is empty")
    if array.dtype.kind not in "uib" or int(array.min()) < 0 or int(array.max()) >= _MOST_NUMBERS:
        raise UnreadableImage(
            name, f"values of type {array.dtype} outside 0..{_MOST_NUMBERS - 1} cannot number classes"
        )
    return array.astype(np.uint8) if array.dtype == bool else array


def _numbers(stored: ImageLike) -> np.ndarray:
    if isinstance(stored, np.ndarray):
        return stored
    if isinstance(stored, Image.Image):
        return np.asarray(stored)
    with open_file(stored) as file, jpeg.no_warnings():
        head = file.read(32)
        file.seek(0)
        if not head:
            raise UnreadableImage("", "the file is empty")
        if head.startswith(NPY_MAGIC):
            return load_npy(file)
        if head.startswith(tiff.MAGIC):
            return tiff.decode_numbers(file)
        if is_png16(head):
            values = decode_png16(file.read()).values
            return values[..., :-1] if values.shape[2] in (2, 4) else values
        with Image.open(file, formats=FORMATS) as image:
            return _from_pil(image)


def _from_pil(image: Any) -> np.ndarray:
    if image.format in _LOSSY:
        raise UnreadableImage(
            "", f"it is a {image.format}, which changes the numbers: masks need a lossless format such as PNG"
        )
    check_pixels(image.height, image.width)
    # Pillow spreads gray values of 2 and 4 bits over 0..255.
    step = 255 // (2 ** _gray_bits(image) - 1) if image.mode == "L" else 1
    image.load()  # PNG may store the rotation after the pixels
    values = upright(np.asarray(image), jpeg.orientation(image))
    return values[..., :-1] if image.mode in ("LA", "RGBA") else values // step


def _gray_bits(image: Any) -> int:
    """Bits of a gray value as stored in an opened PNG file, before it is loaded; 8 for other formats."""
    if image.format != "PNG":
        return 8
    at = image.fp.tell()
    image.fp.seek(24)
    bits = image.fp.read(1)[0]
    image.fp.seek(at)
    return bits
