"""Preprocessing of images for an encoder; it is stored with the weights."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from dmjd.config.checks import MAX_CHANNELS, MAX_SIDE, Bounds, check_float, check_int, plain, shown
from dmjd.config.invalid import BLENDED, check_alpha, nodata_text
from dmjd.files import lists_to_tuples, tuples_to_lists
from dmjd.images.decoding import ImageLike, is_image_like
from dmjd.images.invalid import InvalidPixels, invalid_pixels, mark_invalid
from dmjd.images.reading import read_image
from dmjd.images.resampling import center_box, resize_box

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)

_CACHED_VALUES = 1 << 18  # float32 values that fit into the L2 cache of a core

_OFF = {"nodata": None, "alpha": BLENDED}

_RENAMED = {"normalise": "normalize", "denormalise": "denormalize"}


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] float32; cached, because a new copy to a GPU would block the host at every training step."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images for an encoder; it is stored with the weights.

    Attributes:
        img_size: (h, w) in pixels.
        in_chans: number of channels; see :func:`read_image` for how they are converted.
        mean, std: one number per channel, on the 0..1 scale.
        value_range: (lo, hi) of stored values, which become 0 and 255; None: the range of the data type.
        nodata: None; or invalid pixels, which mean nothing, become the mean: "auto" (NaN, GDAL_NODATA, and padding in
            DICOM), or the value of others, too.
        alpha: "white", or "invalid": pixels of alpha 0 are invalid, too.
    """

    img_size: tuple[int, int]
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: tuple[float, float] | None = None
    nodata: str | None = None
    alpha: str = BLENDED

    def __post_init__(self) -> None:
        self._convert()
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            counts = f"{len(self.mean)} means and {len(self.std)} standard deviations"
            raise ValueError(f"{counts} for {self.in_chans} channels: give one of each per channel")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be (lo, hi) with lo < hi, got {self.value_range}")

    def _convert(self) -> None:
        """Check the types, and store Python's numbers."""
        sizes, bounds = plain(self.img_size), Bounds(ge=1, most=MAX_SIDE)
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise ValueError(f"img_size must be (height, width), got {shown(self.img_size)}")
        converted: dict[str, Any] = {"img_size": tuple(check_int("img_size", side, bounds) for side in sizes)}
        converted["in_chans"] = check_int("in_chans", self.in_chans, Bounds(ge=1, most=MAX_CHANNELS))
        for name in ("mean", "std", "value_range"):
            values = plain(getattr(self, name))
            if name == "value_range" and values is None:
                continue
            if not isinstance(values, list | tuple) or (name == "value_range" and len(values) != 2):
                raise ValueError(f"{name} must be a tuple of numbers, got {shown(values)}")
            converted[name] = tuple(check_float(name, value) for value in values)
        converted |= {"nodata": nodata_text(self.nodata), "alpha": check_alpha(self.alpha)}
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    @property
    def invalid(self) -> InvalidPixels | None:
        """Which pixels are invalid; None if none are."""
        return invalid_pixels(self.nodata, self.alpha)

    @property
    def filling(self) -> InvalidPixels | None:
        """The same, which become the mean on decoding, for tasks that do not ask which pixels are valid."""
        return invalid_pixels(self.nodata, self.alpha, tuple(255 * mean for mean in self.mean))

    @property
    def stored_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std for other libraries, which divide stored values by 255: the result is that of :meth:`normalize`.

        But for values beyond a ``value_range``, which are clipped here alone, and, without one, for other types than
        uint8.
        """
        if self.value_range is None:
            return self.mean, self.std
        low, high = self.value_range
        mean = tuple((low + (high - low) * value) / 255 for value in self.mean)
        return mean, tuple((high - low) * value / 255 for value in self.std)

    def __call__(self, image: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Images (paths, bytes, files, PIL, arrays [H, W, C]; one or a list) -> [B, C, h, w] float32, normalized.

        Images are resized (bicubic, antialiased) to cover the image size, and center-cropped. Invalid pixels are the
        mean: -0.0, by which :meth:`Encoder.encode` leaves them out.

        Raises:
            UnreadableImage: naming the image that cannot be read.
        """
        return self.normalize(self.raw(image))

    def raw(self, image: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Images before normalization: [B, C, h, w] float32 on the 0..255 scale, NaN where invalid; B is 0 for an empty
        list.
        """
        images = image if isinstance(image, Iterable) and not is_image_like(image) else [image]
        reading: dict[str, Any] = {"value_range": self.value_range, "invalid": self.invalid}
        arrays = [read_image(one, self.in_chans, **reading) for one in cast(Sequence[ImageLike], images)]
        if not arrays:
            return torch.empty(0, self.in_chans, *self.img_size, dtype=torch.float32, device="cpu")
        return torch.stack([self.fit(array).float() for array in arrays])

    def fit(self, array: np.ndarray) -> Tensor:
        """Resize and center-crop: [H, W, C] from :func:`read_image` -> [C, h, w], same scale and data type."""
        return resize_box(array, center_box(array.shape[0], array.shape[1], self.img_size), self.img_size)

    def normalize(self, raw: Tensor) -> Tensor:
        """(raw / 255 - mean) / std: [..., C, H, W] on the 0..255 scale, uint8 or float -> float32. NaN, if there are
        invalid pixels, becomes -0.0.

        Raises:
            ValueError: for another number of channels, or what is no tensor.
        """
        self._check_channels(raw)
        if torch.compiler.is_compiling():  # a tensor in the graph would be copied to the device in every step
            channels = zip(raw.float().unbind(-3), self.mean, self.std, strict=True)
            return self._marked(torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=-3))
        mean, std = _per_channel(self.mean, raw.device), _per_channel(self.std, raw.device)
        if raw.dtype != torch.uint8 or raw.device.type != "cpu":
            return self._marked((raw.float() / 255 - mean) / std)
        images = raw.reshape(-1, *raw.shape[-3:])
        out = torch.empty(images.shape, dtype=torch.float32, device="cpu")
        # A few images at a time stay in the cache between the passes.
        few = max(1, _CACHED_VALUES // max(1, raw.shape[-3:].numel()))
        for part, done in zip(images.split(few), out.split(few), strict=True):
            done.copy_(part).div_(255).sub_(mean).div_(std)
        return out.view(raw.shape)

    def _marked(self, normalized: Tensor) -> Tensor:
        return normalized if self.invalid is None else mark_invalid(normalized)

    def filled(self, raw: Tensor) -> Tensor:
        """The mean in place of NaN: [..., C, H, W] on the 0..255 scale, same type; others unchanged."""
        if self.invalid is None or not raw.is_floating_point():
            return raw
        if torch.compiler.is_compiling():  # as in normalize
            channels = zip(raw.unbind(-3), self.mean, strict=True)
            return torch.stack(
                [torch.where(channel.isnan(), 255 * mean, channel) for channel, mean in channels], dim=-3
            )
        return torch.where(raw.isnan(), 255 * _per_channel(self.mean, raw.device), raw)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Inverse of :meth:`normalize`: [..., C, H, W] -> float32 on the 0..255 scale, not clamped."""
        self._check_channels(normalized)
        device = normalized.device
        return (normalized.float() * _per_channel(self.std, device) + _per_channel(self.mean, device)) * 255

    def _check_channels(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a [..., C, H, W] tensor, got {type(images).__name__}")
        if images.dim() < 3 or images.shape[-3] != self.in_chans:
            raise ValueError(f"images must be [..., {self.in_chans}, H, W], got {list(images.shape)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for :meth:`from_dict`; ``nodata`` and ``alpha`` only if they are on, as in former versions."""
        return {name: value for name, value in tuples_to_lists(vars(self)).items() if value != _OFF.get(name, ())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """Inverse of :meth:`to_dict`; ValueError for other names or values."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not names - set(_OFF) <= set(values) <= names:
            raise ValueError(f"not the settings of a preprocessing: {shown(values)}")
        return cls(**lists_to_tuples(values))

    if not TYPE_CHECKING:  # otherwise a type checker would accept any attribute

        def __getattr__(self, name: str) -> NoReturn:
            hint = f"; it was renamed to '{_RENAMED[name]}'" if name in _RENAMED else ""
            raise AttributeError(f"'Preprocess' object has no attribute '{name}'{hint}", name=name, obj=self)
