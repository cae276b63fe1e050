"""One picture at a time: decoding, the channel policy, and the preprocessing that travels with the weights.

Arrays are [H, W, C], tensors [C, H, W]; values are on the 0..255 scale until :meth:`Preprocess.normalise`.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmjd import jpeg
from dmjd.formats import MAX_PIXELS, BadPicture, Picture, decode_plain, open_stored, reason
from dmjd.resampling import centre_box, resample, resize_box

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "BadPicture",
    "OpenPicture",
    "Picture",
    "Preprocess",
    "open_picture",
    "read_picture",
    "resample",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_picture(
    source: Picture, in_chans: int = 3, value_range: tuple[float, float] | None = None, name: str = ""
) -> np.ndarray:
    """Decode a picture and bring it to ``in_chans`` channels on the 0..255 scale.

    JPEG, PNG, WebP, BMP, TIFF, GIF (first frame) and ``.npy`` ([H, W], [H, W, C] or [C, H, W]) are read; EXIF
    rotation is applied. Channels, where a second or fourth channel of a picture counts as its alpha:

    - 1: luminance of colour (Rec. 601), alpha composited over white;
    - 3: grey is repeated, alpha composited over white;
    - 4: RGBA as it is, opaque where there is no alpha;
    - any other number: the picture must have exactly that many, and they are kept as they are.

    Args:
        source: path, encoded bytes, PIL picture or array.
        in_chans: number of channels wanted.
        value_range: (lo, hi) of the stored values that become 0 and 255; values outside are clipped. None: the
            range of the data type (8-bit 0..255, 16-bit 0..65535, floats 0..1).
        name: what an error calls the picture; default the path.

    Returns:
        [H, W, in_chans], contiguous: uint8 where the source is 8-bit and ``value_range`` changes nothing, else float32.

    Raises:
        BadPicture: for anything that keeps the picture from being used.
    """
    return open_picture(source, in_chans, value_range, name).read()


def open_picture(
    source: Picture, in_chans: int = 3, value_range: tuple[float, float] | None = None, name: str = ""
) -> "OpenPicture":
    """A picture whose size is known; arguments and errors as for :func:`read_picture`."""
    name = name or (str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>")
    with _naming(name):
        stored = open_stored(source, in_chans)
        if isinstance(stored, np.ndarray):
            stored = _converted(stored, in_chans, value_range)
    return OpenPicture(stored, in_chans, value_range, name)


@dataclass(frozen=True)
class OpenPicture:
    """A picture of known size. A common JPEG is decoded when it is read, and read errors come then; others on opening.

    Attributes:
        stored: decoded and converted, [H, W, in_chans], or encoded. in_chans, value_range, name: see
            :func:`read_picture`.
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
        """What :func:`read_picture` returns."""
        if isinstance(self.stored, np.ndarray):
            return self.stored
        with _naming(self.name):
            return _converted(decode_plain(self.stored), self.in_chans, self.value_range)

    def read_for(self, box: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray, Sequence[float]]:
        """What is needed to resize ``box`` (top, left, height, width) to ``size`` (h, w): pixels, and the box in them.

        Pixels are those of :meth:`read`, or a picture 2, 4 or 8 times smaller in which the box is still twice ``size``.
        """
        factor = 1 if isinstance(self.stored, np.ndarray) else jpeg.reduction(box, size)
        if isinstance(self.stored, np.ndarray) or factor == 1:
            return self.read(), box
        with _naming(self.name):
            reduced = _converted(decode_plain(self.stored, factor), self.in_chans, self.value_range)
        return reduced, [x / factor for x in box]


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is a BadPicture of this name."""
    try:
        yield
    except BadPicture as error:
        raise BadPicture(name, error.reason) from None
    # Decoders fail on damaged bytes with nearly every built-in exception; whatever it is, only this picture is lost.
    except Exception as error:
        raise BadPicture(name, reason(error)) from None


def _converted(stored: np.ndarray, in_chans: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """Stored values -> [H, W, in_chans] on the 0..255 scale."""
    return np.ascontiguousarray(_to_channels(_to_255(stored, value_range), in_chans))


def _to_255(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Stored values -> the 0..255 scale: uint8 stays as it is, all else becomes float32."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8 and value_range in (None, (0, 255)):
        return array
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "uif":
        raise BadPicture("", f"values of type {array.dtype} are no pixels")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadPicture("", "it has values that are not finite")
    lo, hi = value_range or _natural_range(array)
    return ((np.clip(array, lo, hi).astype(np.float64) - lo) * (255.0 / (hi - lo))).astype(np.float32)


def _natural_range(array: np.ndarray) -> tuple[float, float]:
    """The range a data type stands for where none is given."""
    if array.dtype in (np.uint8, np.uint16):
        return 0.0, float(np.iinfo(array.dtype).max)
    lo, hi = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and lo >= -0.01 and hi <= 1.01:  # a little overshoot is left by resampling
        return 0.0, 1.0
    expected = "outside 0..1" if array.dtype.kind == "f" else "of no natural range"
    raise BadPicture("", f"{array.dtype} values from {lo:g} to {hi:g}, {expected}: give value_range=(lo, hi)")


def _to_channels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """The channel policy of :func:`read_picture` on [H, W, C] values of the 0..255 scale."""
    channels = array.shape[2]
    if channels == in_chans:
        return array
    if in_chans not in (1, 3, 4) or channels > 4:
        raise BadPicture("", f"it has {channels} channel{'s' * (channels != 1)}, in_chans is {in_chans}")
    colour, alpha = (array[..., :-1], array[..., -1:]) if channels in (2, 4) else (array, None)
    if in_chans == 4:
        opaque = np.full_like(array[..., :1], 255)
        return np.concatenate([np.broadcast_to(colour, (*array.shape[:2], 3)), opaque if alpha is None else alpha], 2)
    if alpha is not None:
        colour = _over_white(colour, alpha)
    if in_chans == 1:
        return _luminance(colour) if colour.shape[2] == 3 else colour
    return np.broadcast_to(colour, (*array.shape[:2], 3))


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite [H, W, 1 or 3] over white by alpha [H, W, 1]; same data type."""
    share = alpha.astype(np.float32) / 255
    mixed = colour * share + 255 * (1 - share)
    return np.rint(mixed).astype(np.uint8) if colour.dtype == np.uint8 else mixed.astype(np.float32)


def _luminance(colour: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W, 1] by Rec. 601 weights; for uint8 the same integers as Pillow's."""
    if colour.dtype == np.uint8:
        mixed = colour.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((mixed + 0x8000) >> 16).astype(np.uint8)[..., None]
    return (colour @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


_CACHED_VALUES = 1 << 18  # of float32, so that they lie in a core's second-level cache


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] float32; kept, since making it anew would stop the host at every training step."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Preprocess:
    """What an encoder wants done to a picture; it is stored with the weights.

    Attributes:
        img_size: (h, w) in pixels. in_chans: number of channels, see :func:`read_picture` for the policy.
        mean, std: one number per channel, on the 0..1 scale.
        value_range: (lo, hi) of stored values that become 0 and 255; None: the range of the data type.
    """

    img_size: tuple[int, int]
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            counts = f"{len(self.mean)} means and {len(self.std)} standard deviations"
            raise ValueError(f"{counts} for {self.in_chans} channels: give one of each per channel")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be (lo, hi) with lo < hi, got {self.value_range}")

    def __call__(self, picture: Picture | Sequence[Picture]) -> Tensor:
        """Pictures (paths, bytes, PIL, arrays [H, W, C]; one or a list) -> [B, C, h, w] float32, normalised.

        The shorter side is resized (bicubic, antialiased) to the image size and the centre cut out.

        Raises:
            BadPicture: naming the picture that can't be used.
        """
        return self.normalise(self.raw(picture))

    def raw(self, picture: Picture | Sequence[Picture]) -> Tensor:
        """The same before normalising: [B, C, h, w] float32 on the 0..255 scale."""
        if isinstance(picture, str | Path | bytes | Image.Image | np.ndarray):
            picture = [picture]
        arrays = [read_picture(one, self.in_chans, self.value_range) for one in picture]
        return torch.stack([self.fit(array).float() for array in arrays])

    def fit(self, array: np.ndarray) -> Tensor:
        """What :func:`read_picture` gave -> [C, h, w] of the image size, 0..255 scale, same data type."""
        return resize_box(array, centre_box(array.shape[0], array.shape[1], self.img_size), self.img_size)

    def normalise(self, raw: Tensor) -> Tensor:
        """[..., C, H, W] on the 0..255 scale, uint8 or float -> float32 of the data's mean 0 and variance 1."""
        mean, std = _per_channel(self.mean, raw.device), _per_channel(self.std, raw.device)
        if raw.dtype != torch.uint8 or raw.device.type != "cpu" or torch.compiler.is_compiling():
            return (raw.float() / 255 - mean) / std
        pictures = raw.reshape(-1, *raw.shape[-3:])
        out = torch.empty(pictures.shape)
        # A few at a time: the passes after the first find them in the cache.
        few = max(1, _CACHED_VALUES // max(1, raw.shape[-3:].numel()))
        for part, done in zip(pictures.split(few), out.split(few), strict=True):
            torch.div(part, 255, out=done).sub_(mean).div_(std)
        return out.view(raw.shape)

    def denormalise(self, normalised: Tensor) -> Tensor:
        """Inverse of :meth:`normalise`: [..., C, H, W] -> float32 on the 0..255 scale, not clamped."""
        device = normalised.device
        return (normalised.float() * _per_channel(self.std, device) + _per_channel(self.mean, device)) * 255

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for :meth:`from_dict`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """Inverse of :meth:`to_dict`."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)
