"""Read single images: decoding, value range, number of channels.

Arrays are [H, W, C] with values on the 0..255 scale.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmjd.images import jpeg
from dmjd.images.decoding import ImageLike, decode_plain, is_image_like, open_stored, reason
from dmjd.images.invalid import HINT, InvalidPixels, to_nan, without_invalid
from dmjd.images.stored import Stored, UnreadableImage

LUMINANCE = (0.299, 0.587, 0.114)  # weights of red, green, blue (ITU-R Rec. 601)

# The same weights in steps of 2^-16, as in Pillow.
_LUMINANCE_16_BITS = (19595, 38470, 7471)

# Errors that say nothing about the image: too many open files, no memory.
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def read_image(
    source: ImageLike,
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    name: str = "",
    invalid: InvalidPixels | None = None,
) -> np.ndarray:
    """Decode an image and convert it to ``in_chans`` channels on the 0..255 scale.

    Reads JPEG, PNG, WebP, BMP, TIFF, GIF (first frame), DICOM (``scan.dcm#7`` is frame 7) and ``.npy`` ([H, W],
    [H, W, C] or [C, H, W]), and applies EXIF rotation. The second of two and the fourth of four channels are alpha,
    except for TIFF samples that the file does not call alpha: these are dropped where ``in_chans`` is smaller.
    Conversion to

    - 1 channel: luminance (Rec. 601), alpha composited over white;
    - 3 channels: gray is repeated, alpha composited over white;
    - 4 channels: RGBA, opaque if the image has no alpha;
    - any other number: none; the image must have that number of channels.

    Args:
        source: path, encoded bytes, binary file (read from its start), PIL image or array.
        in_chans: number of channels of the result.
        value_range: (lo, hi) of the stored values, which become 0 and 255; values outside are clipped. None: the range
            of the data type (8-bit 0..255, 16-bit 0..65535, float 0..1); of a DICOM file its window.
        name: name of the image in error messages; default: the path.
        invalid: which pixels mean nothing; they become NaN, and only the others need to lie in the range. None: an
            image with values that are not finite is unreadable.

    Returns:
        [H, W, in_chans], contiguous; uint8 if the source is 8-bit, ``value_range`` changes nothing and all pixels are
        valid, else float32.

    Raises:
        UnreadableImage: if the image cannot be used for any reason.
        TypeError: if ``source`` is of another type.
    """
    return open_image(source, in_chans, value_range, name, invalid).read()


def open_image(
    source: ImageLike,
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    name: str = "",
    invalid: InvalidPixels | None = None,
) -> "OpenImage":
    """Open an image to know its size before decoding. Arguments and errors are those of :func:`read_image`."""
    if not is_image_like(source):
        raise TypeError(f"an image is a path, bytes, a binary file, a PIL image or an array, not {type(source)}")
    name = name or (str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>")
    with _naming(name):
        stored = open_stored(source, in_chans, value_range)
        if invalid is not None and invalid.nodata is not None and not isinstance(stored, Stored):
            stored = Stored(decode_plain(stored))  # a plain JPEG has no other invalid pixels
        pixels = _converted(stored, in_chans, value_range, invalid) if isinstance(stored, Stored) else stored
    return OpenImage(pixels, in_chans, value_range, name)


@dataclass(frozen=True)
class OpenImage:
    """An opened image of known size. Plain JPEGs are decoded (and may fail) in :meth:`read`, other formats on opening.

    Attributes:
        stored: decoded and converted array [H, W, in_chans], or encoded JPEG.
        in_chans, value_range, name: see :func:`read_image`.
    """

    stored: np.ndarray | jpeg.PlainJpeg
    in_chans: int
    value_range: tuple[float, float] | None
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        if isinstance(self.stored, np.ndarray):
            return self.stored.shape[0], self.stored.shape[1]
        return self.stored.height, self.stored.width

    def read(self) -> np.ndarray:
        """The array that :func:`read_image` returns."""
        if isinstance(self.stored, np.ndarray):
            return self.stored
        with _naming(self.name):
            return _converted(Stored(decode_plain(self.stored)), self.in_chans, self.value_range)

    def read_for(self, box: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray, Sequence[float]]:
        """Pixels for resizing ``box`` (top, left, height, width) to ``size`` (h, w), and the box in these pixels.

        A JPEG is decoded 2, 4 or 8 times smaller if the box is then still at least twice ``size``.
        """
        factor = 1 if isinstance(self.stored, np.ndarray) else jpeg.reduction(box, size)
        if isinstance(self.stored, np.ndarray) or factor == 1:
            return self.read(), box
        with _naming(self.name):
            reduced = _converted(Stored(decode_plain(self.stored, factor)), self.in_chans, self.value_range)
        return reduced, [x / factor for x in box]


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn every error inside the context into an UnreadableImage with this name."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    # Decoders raise nearly every built-in exception on damaged bytes; none may affect other images.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise
        raise UnreadableImage(name, reason(error)) from None


def _converted(
    stored: Stored,
    in_chans: int,
    value_range: tuple[float, float] | None,
    invalid: InvalidPixels | None = None,
) -> np.ndarray:
    """Stored values -> [H, W, in_chans] on the 0..255 scale. ``value_range`` is that of the colors, not of alpha."""
    values, alpha, value_range = stored.values, None, value_range or stored.value_range
    is_mask = invalid is not None and invalid.alpha and in_chans != 4
    has_alpha = in_chans in (1, 3, 4) if stored.alpha else is_mask and stored.masked and in_chans == values.shape[2] - 1
    found = invalid.find(dataclasses.replace(stored, alpha=has_alpha)) if invalid is not None else None
    if has_alpha:
        values, alpha = values[..., :-1], _to_255(values[..., -1:], _full_range(values.dtype))
        alpha = None if is_mask else alpha
    if found is None:
        return np.ascontiguousarray(_to_channels(_valid_to_255(values, value_range, stored), alpha, in_chans))
    assert invalid is not None
    color = to_nan(_to_255(without_invalid(values, found), value_range), found)
    if alpha is not None:
        alpha = to_nan(alpha, np.all(found, axis=-1, keepdims=True))
    image = np.ascontiguousarray(_to_channels(color, alpha, in_chans))
    return image if invalid.fill is None else np.where(np.isnan(image), np.array(invalid.fill, np.float32), image)


def _valid_to_255(values: np.ndarray, value_range: tuple[float, float] | None, stored: Stored) -> np.ndarray:
    """:func:`_to_255`, where none are invalid: the reason says if the file means that some are."""
    try:
        return _to_255(values, value_range)
    except UnreadableImage as error:
        if stored.nodata is None or not (values == stored.nodata).any():
            raise
        raise UnreadableImage("", f"{error.reason}; of these {stored.nodata:g} means no data: {HINT}") from None


def _full_range(dtype: np.dtype) -> tuple[float, float]:
    """From transparent to opaque."""
    return (0.0, float(np.iinfo(dtype).max)) if dtype.kind in "ui" else (0.0, 1.0)


def _to_255(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Stored values -> the 0..255 scale: uint8 is unchanged, other types become float32."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8 and value_range in (None, (0, 255)):
        return array
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "uif":
        raise UnreadableImage("", f"values of type {array.dtype} are not pixels")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UnreadableImage("", f"it has values that are not finite: {HINT}")
    lo, hi = value_range or _natural_range(array)
    return ((np.clip(array, lo, hi).astype(np.float64) - lo) * (255.0 / (hi - lo))).astype(np.float32)


def _natural_range(array: np.ndarray) -> tuple[float, float]:
    """Value range of a data type if none is given."""
    if array.dtype in (np.uint8, np.uint16):
        return 0.0, float(np.iinfo(array.dtype).max)
    lo, hi = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and lo >= -0.01 and hi <= 1.01:  # earlier resampling may overshoot a little
        return 0.0, 1.0
    expected = "outside 0..1" if array.dtype.kind == "f" else "of no natural range"
    raise UnreadableImage(
        "", f"{array.dtype} values from {lo:g} to {hi:g}, {expected}: give --value-range LO HI (value_range in Python)"
    )


def _to_channels(color: np.ndarray, alpha: np.ndarray | None, in_chans: int) -> np.ndarray:
    """The channel conversion of :func:`read_image`: [H, W, C] and alpha [H, W, 1] on the 0..255 scale."""
    bands = color.shape[2]
    if alpha is None and bands == in_chans:
        return color
    if in_chans not in (1, 3, 4) or bands > 4:
        channels = bands + (alpha is not None)
        raise UnreadableImage("", f"it has {channels} channel{'s' * (channels != 1)}, in_chans is {in_chans}")
    if bands in (2, 4):  # gray or RGB, and a band of unknown meaning
        color = color[..., :-1]
    if in_chans == 4:
        color = np.broadcast_to(color, (*color.shape[:2], 3))
        return np.concatenate([color, np.full_like(color[..., :1], 255) if alpha is None else alpha], axis=2)
    if alpha is not None:
        color = _over_white(color, alpha)
    if in_chans == 1:
        return _luminance(color) if color.shape[2] == 3 else color
    return np.broadcast_to(color, (*color.shape[:2], 3))


def _over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite [H, W, 1 or 3] over white with alpha [H, W, 1]; keeps the data type."""
    opacity = alpha.astype(np.float32) / 255
    mixed = color * opacity + 255 * (1 - opacity)
    return np.rint(mixed).astype(np.uint8) if color.dtype == np.uint8 else mixed.astype(np.float32)


def _luminance(color: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W, 1]; for uint8 the same integers as Pillow's."""
    if color.dtype == np.uint8:
        mixed = color.astype(np.uint32) @ np.array(_LUMINANCE_16_BITS, np.uint32)
        return ((mixed + 0x8000) >> 16).astype(np.uint8)[..., None]
    return (color @ np.array(LUMINANCE, np.float32))[..., None]
