"""Decoded values of an image, as stored, and the checks and rotations that every format shares."""

from dataclasses import dataclass

import numpy as np

MAX_PIXELS = 178_956_970  # larger images are taken for decompression bombs, as in Pillow

MAX_BYTES = 1 << 32  # of decoded values; a limit for images of many channels


class UnreadableImage(ValueError):  # noqa: N818, the name is clear without "Error"
    """An image that cannot be used, with its ``name`` and the ``reason`` in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both are arguments, so that the exception can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Stored:
    """Decoded values.

    Attributes:
        values: [H, W, C] in the stored data type.
        alpha: whether the last channel is alpha. Without alpha, a second or fourth channel is a band like the others.
        nodata: the value that means nothing, if the file names one.
        masked: whether the last of several bands beyond the colors is alpha; it is a band like the others, unless alpha
            says which pixels are valid.
        value_range: the values that become 0 and 255 if no others are given; None: those of the data type.
        padding: [H, W, 1] bool, the pixels that the file says mean nothing, if it does not say so by ``nodata``.
        measured: [H, W, C], what a value that means nothing is compared with, if ``values`` were inverted or replaced.
    """

    values: np.ndarray
    alpha: bool = False
    nodata: float | None = None
    masked: bool = False
    value_range: tuple[float, float] | None = None
    padding: np.ndarray | None = None
    measured: np.ndarray | None = None


def check_pixels(height: int, width: int, bytes_per_pixel: int = 1) -> None:
    """Refuse empty images, and decompression bombs before they are decoded."""
    if height * width > MAX_PIXELS:
        raise UnreadableImage("", f"{height} x {width} pixels, more than {MAX_PIXELS:,}")
    if height * width * bytes_per_pixel > MAX_BYTES:
        raise UnreadableImage("", f"{height} x {width} pixels of {bytes_per_pixel} bytes, more than 4 GiB")
    if height * width == 0:
        raise UnreadableImage("", f"{height} x {width} pixels: the image is empty")


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF or TIFF orientation (1 to 8) to [H, W, ...]; other values mean upright."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return array[rows, columns]
