"""Invalid pixels: those that mean nothing, such as NaN, the edge of a satellite scene, or what is transparent.

On decoding they become NaN. Resizing weighs values by their validity. A batch is normalized to what an encoder can
take: there they are the mean, which is 0, written as -0.0. A valid 0 is +0.0, so the sign tells the two apart, and
anything that does not ask gets a number like others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmjd.config.invalid import INVALID, nodata_value
from dmjd.images.stored import Stored, UnreadableImage
from dmjd.nn.tokens import patchify

HINT = "--nodata auto takes them as invalid pixels"

LEAST_VALID = 0.5  # of the values of a token, of the weight of a resized value, of the area of a crop


@dataclass(frozen=True)
class InvalidPixels:
    """Which stored values mean nothing. NaN, infinite values, the GDAL_NODATA of a TIFF, and padding in DICOM do.

    Attributes:
        nodata: a value that does, too. In 8-bit images it must be that of all colors of a pixel, as black is common in
            one; in others each channel is on its own.
        alpha: whether pixels of alpha 0 do. The others are not blended with white then.
        fill: values per channel on the 0..255 scale that they get; None: NaN.
    """

    nodata: float | None = None
    alpha: bool = False
    fill: tuple[float, ...] | None = None

    def find(self, stored: Stored) -> np.ndarray | None:
        """Invalid values of the colors, [H, W, C] bool, or [H, W, 1] if all channels share them; None if all are valid.

        Raises:
            UnreadableImage: if no value is valid.
        """
        colors = stored.values[..., :-1] if stored.alpha else stored.values
        compared = colors if stored.measured is None else stored.measured
        found = [_equal(compared, value) for value in (self.nodata, stored.nodata) if value is not None]
        if stored.padding is not None:
            found.append(stored.padding)
        if colors.dtype.kind == "f":
            found.append(~np.isfinite(colors))
        if self.alpha and stored.alpha:
            found.append(stored.values[..., -1:] == 0)
        found = [one for one in found if one.any()]
        if not found:
            return None
        invalid = found[0]
        for one in found[1:]:
            invalid = invalid | one
        if invalid.all():
            raise UnreadableImage("", "none of its pixels is valid")
        return invalid


def invalid_pixels(nodata: str | None, alpha: str, fill: tuple[float, ...] | None = None) -> InvalidPixels | None:
    """The invalid pixels of the settings ``nodata`` and ``alpha``; None if both are off."""
    if nodata is None and alpha != INVALID:
        return None
    return InvalidPixels(nodata_value(nodata), alpha == INVALID, fill)


def _equal(values: np.ndarray, number: float) -> np.ndarray:
    """Where values are a number, in their own type; of 8-bit pixels where all channels are: [H, W, C or 1] bool."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values == values.dtype.type(number)
    if values.dtype == np.uint8:
        return (values == number).all(axis=-1, keepdims=True)
    return values == number


def without_invalid(values: np.ndarray, invalid: np.ndarray) -> np.ndarray:
    """A copy of [H, W, C] with a valid value in place of invalid ones, so that ranges are those of valid values."""
    invalid = np.broadcast_to(invalid, values.shape)
    return np.where(invalid, values[~invalid][0], values)


def to_nan(values: np.ndarray, invalid: np.ndarray) -> np.ndarray:
    """[H, W, C] as float32, NaN where ``invalid`` ([H, W, C or 1] bool)."""
    return np.where(invalid, np.float32(np.nan), values.astype(np.float32))


def has_invalid(image: np.ndarray) -> bool:
    """Whether an image on the 0..255 scale holds NaN; 8-bit ones do not."""
    return image.dtype != np.uint8 and bool(np.isnan(image.min()))


def valid_share(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The share of values in boxes of an image that are valid.

    Args:
        image: [H, W, C] float32.
        boxes: [n, 4] (top, left, height, width) of whole numbers.

    Returns:
        [n] float64.
    """
    H, W, C = image.shape
    valid = np.zeros((H + 1, W + 1), np.int64)
    np.cumsum(np.cumsum(np.isfinite(image).sum(axis=2), axis=0), axis=1, out=valid[1:, 1:])
    top, left, height, width = boxes.astype(np.int64).T
    bottom, right = top + height, left + width
    inside = valid[bottom, right] - valid[top, right] - valid[bottom, left] + valid[top, left]
    return inside / (height * width * C)


def mark_invalid(normalized: Tensor) -> Tensor:
    """Normalized images with NaN -> the same with -0.0 in its place, and nowhere else."""
    return torch.where(normalized.isnan(), -0.0, torch.where(normalized == 0, 0.0, normalized))


def valid_pixels(normalized: Tensor) -> Tensor:
    """Normalized images of :func:`mark_invalid` -> bool of the same shape."""
    return ~((normalized == 0) & normalized.signbit())


def valid_tokens(valid: Tensor, patch_size: int) -> Tensor:
    """Tokens of which at least half of the values are valid: [B, C, H, W] bool -> [B, N] bool."""
    patches = patchify(valid.float(), patch_size)  # B, N, P*P*C
    return patches.sum(dim=-1) >= LEAST_VALID * patches.shape[2]


def pooled_tokens(valid: Tensor, patch_size: int) -> Tensor:
    """:func:`valid_tokens`, but all of an image that has none: those that count in pooled features."""
    tokens = valid_tokens(valid, patch_size)
    return tokens | ~tokens.any(dim=1, keepdim=True)
