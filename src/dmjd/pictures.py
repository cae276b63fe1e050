"""One picture at a time: decoding, the channel policy, and the preprocessing that travels with the weights.

Arrays are [H, W, C], tensors [C, H, W]; values are on the 0..255 scale until :meth:`Preprocess.normalise`.
"""

import contextlib
import functools
import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dmjd.resampling import centre_box, resample, resize_box

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "BadPicture",
    "Picture",
    "Preprocess",
    "read_picture",
    "resample",
]

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Picture = str | Path | bytes | Image.Image | np.ndarray

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
_NPY_MAGIC = b"\x93NUMPY"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_OPAQUE_MODES = {"1": "L", "L": "L", "RGB": "RGB", "RGBX": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


class BadPicture(ValueError):  # noqa: N818, the name says what is bad
    """A picture that can't be used: ``name`` says which, ``reason`` why, in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both in args: the exception crosses process borders by pickle
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


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
    name = name or (str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>")
    try:
        with _no_warnings():
            stored = _decode(source, in_chans)
        return np.ascontiguousarray(_to_channels(_to_255(stored, value_range), in_chans))
    except BadPicture as error:
        raise BadPicture(name, error.reason) from None
    # Decoders fail on damaged bytes with nearly every built-in exception; whatever it is, only this picture is lost.
    except Exception as error:
        raise BadPicture(name, _reason(error)) from None


_warnings_lock = threading.Lock()
_warnings_readers = 0
_warnings_saved: warnings.catch_warnings | None = None


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
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


def _reason(error: Exception) -> str:
    """A few words for an error of a decoder or the file system."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {MAX_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())
    return f"damaged or unsupported ({text[:120] or type(error).__name__})"


def _decode(source: Picture, in_chans: int) -> np.ndarray:
    """The stored values, [H, W, C] or (arrays) any of the accepted layouts, in their own data type."""
    if isinstance(source, np.ndarray):
        return _channels_last(source, in_chans)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        head = file.read(32)
        file.seek(0)
        if not head:
            raise BadPicture("", "the file is empty")
        if head.startswith(_NPY_MAGIC):
            return _channels_last(np.load(file, allow_pickle=False), in_chans)
        if head.startswith(_PNG_MAGIC) and head[24:26] in (b"\x10\x02", b"\x10\x06"):
            return _decode_png16(file.read())
        if head.startswith(_TIFF_MAGIC):
            return _decode_tiff(file, in_chans)
        with Image.open(file) as image:
            return _from_pil(image)


def _check_pixels(height: int, width: int) -> None:
    """Refuse bombs before they are unpacked."""
    if height * width > MAX_PIXELS:
        raise BadPicture("", f"{height} x {width} pixels, more than {MAX_PIXELS:,}")
    if height * width == 0:
        raise BadPicture("", f"{height} x {width} pixels: nothing to see")


def _from_pil(image: Image.Image) -> np.ndarray:
    """[H, W, C] upright: 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha; uint8, uint16, int32 or float32."""
    _check_pixels(image.height, image.width)
    image.load()  # before asking for transparency and rotation, which some formats store behind the pixels
    if image.mode.startswith(("I", "F")):  # 16-bit grey, integers and floats: read as stored
        array = np.asarray(image)
        if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
            array = array.astype(np.uint16)  # some 16-bit files open as 32-bit integers
    else:
        mode = _plain_mode(image)
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    array = _upright(array, image)
    return array[:, :, None] if array.ndim == 2 else array


def _plain_mode(image: Image.Image) -> str:
    """The grey or RGB mode, with alpha where the picture has some, that holds an 8-bit picture without loss."""
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


def _upright(array: np.ndarray, image: Image.Image) -> np.ndarray:
    """Undo the rotation that EXIF names; damaged EXIF data costs the rotation, not the picture."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return array
    return _UPRIGHT[orientation](array) if orientation in _UPRIGHT else array


def _decode_png16(data: bytes) -> np.ndarray:
    """16-bit colour PNG, which Pillow would cut to 8 bits: [H, W, 3 or 4] uint16."""
    from torchvision.io import ImageReadMode, decode_png  # seconds to import, and rarely needed

    _check_pixels(*struct.unpack(">II", data[16:24]))
    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels.permute(1, 2, 0).numpy()


def _decode_tiff(file: Any, in_chans: int) -> np.ndarray:
    """Pillow for 8-bit and grey pictures; tifffile for the rest, which Pillow would cut to 8 bits or 4 channels."""
    if in_chans in (1, 3, 4):
        try:
            with Image.open(file) as image:
                samples, bits = image.tag_v2.get(277, 1), max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
                if samples == 1 or (samples <= 4 and bits <= 8):
                    return _from_pil(image)
        except UnidentifiedImageError:
            pass
    import tifffile

    file.seek(0)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs every odd tag; failures are raised anyway
    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        sides = dict(zip(series.axes, series.shape, strict=True))
        _check_pixels(sides.get("Y", 1), sides.get("X", 1))
        array = series.asarray()
    return _channels_last(array[0] if array.ndim == 4 else array, in_chans)


def _channels_last(array: np.ndarray, in_chans: int) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] -> [H, W, C]: channels are the axis of length in_chans, else the shorter one."""
    if array.ndim not in (2, 3):
        raise BadPicture("", f"array of shape {tuple(array.shape)}; expected [H, W], [H, W, C] or [C, H, W]")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] != in_chans and (array.shape[0] == in_chans or array.shape[0] < array.shape[2]):
        array = array.transpose(1, 2, 0)
    _check_pixels(array.shape[0], array.shape[1])
    return array


def _to_255(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Stored values -> the 0..255 scale: uint8 stays as it is, all else becomes float32."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8 and value_range in (None, (0, 255)):
        return array
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
        return (raw.float() / 255 - _per_channel(self.mean, raw.device)) / _per_channel(self.std, raw.device)

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
