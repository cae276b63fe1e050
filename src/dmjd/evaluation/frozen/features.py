"""Features of a set of images for all evaluations on frozen features, extracted in one pass.

Shapes: n images, D width of a feature, C image channels, H, W image sides.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.config.fields import FEATURE_PRECISIONS
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.engine.console import tracked
from dmjd.images.preprocess import Preprocess
from dmjd.nn.modes import evaluating
from dmjd.targets.teacher import to_channels

RAW_PIXEL_VALUES = 32 * 32 * 3  # largest size of a raw-pixel feature


@dataclass(frozen=True)
class Features:
    """Frozen features of a set of images, on the CPU.

    Attributes:
        x: [n, D] float32.
        labels: [n] int64; -1 if the source has none.
        rows: [n] int64, indices of the images in the source; ascending.
        unreadable: (name, reason) of the images that could not be read.
        parts: names of the features that are concatenated in ``x``, each of the same width.
    """

    x: Tensor
    labels: Tensor
    rows: Tensor
    unreadable: tuple[tuple[str, str], ...] = ()
    parts: tuple[str, ...] = ("features",)


# Maps a batch of images, normalized [b, C, H, W] on the device, to features [b, D].
Extractor = Callable[[Tensor], Tensor]


def pooled(encoder: Encoder, precision: str = "fp32") -> Extractor:
    """The downstream feature of an encoder: normalized [b, C, H, W] -> [b, D] float32.

    Args:
        encoder: an encoder in evaluation mode.
        precision: "fp32" or "bf16" (autocast); pooling is float32.

    Raises:
        ValueError: for an unknown precision.
    """
    if precision not in FEATURE_PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(FEATURE_PRECISIONS)}, got '{precision}'")

    def extract_features(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = encoder(images)
        return encoder.pool(tokens.float(), encoder.valid_tokens(images))

    return extract_features


def raw_pixels(images: Tensor) -> Tensor:
    """Raw pixels as features: normalized [b, C, H, W] -> [b, C*h*w], downsampled by area to at most 3,072 values."""
    _, C, H, W = images.shape
    if C * H * W > RAW_PIXEL_VALUES:
        scale = math.sqrt(RAW_PIXEL_VALUES / (C * H * W))
        images = F.interpolate(images, size=(max(1, int(H * scale)), max(1, int(W * scale))), mode="area")
    return images.flatten(1)


def extract_all(
    extractors: Mapping[str, Extractor],
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_workers: int | None = None,
    own: Mapping[str, Preprocess] = MappingProxyType({}),
) -> dict[str, Features]:
    """Extract several kinds of features in one pass, so that each image is read and decoded once.

    Args:
        extractors: name -> function; all run on the same batches, without gradients.
        source: the images, in order; unreadable ones are skipped and listed.
        preprocess: how images become tensors.
        batch_size: images per batch.
        device: device that the functions run on.
        num_workers: data loading processes; None: by the number of cores.
        own: name of an extractor -> its preprocessing, if that is another; its images are made from the same decoded
            ones. Their range of values is that of ``preprocess``; 1, 3 and 4 channels become 1 or 3.

    Returns:
        Name of the extractor -> features.

    Raises:
        ValueError: for a batch size below 1, or if no image can be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sizes = {own[name].img_size for name in extractors if name in own} - {preprocess.img_size}
    loader = EvalLoader(source, preprocess, batch_size=batch_size, num_workers=num_workers, sizes=sorted(sizes))
    groups: dict[Preprocess, list[str]] = {}
    for name in extractors:
        groups.setdefault(own.get(name, preprocess), []).append(name)
    parts: dict[str, list[Tensor]] = {name: [] for name in extractors}
    labels, rows = [], []
    with torch.inference_mode():
        for batch in tracked(loader, f"features of {source.title}", len(loader), lambda batch: batch.size):
            for one, names in groups.items():
                raw = batch.resized.get(one.img_size, batch.raw).to(device)
                if one != preprocess:
                    raw = to_channels(preprocess.filled(raw), one.in_chans)
                images = one.normalize(raw)  # b, C, H, W
                for name in names:
                    parts[name].append(extractors[name](images).float().cpu())  # b, D
            labels.append(batch.labels if batch.labels is not None else torch.full_like(batch.index, -1))
            rows.append(batch.index)
    if not rows:
        raise ValueError(f"none of the {len(source)} images of {source.name} can be read")
    unreadable = tuple(loader.unreadable)
    return {name: Features(torch.cat(xs), torch.cat(labels), torch.cat(rows), unreadable) for name, xs in parts.items()}


def extract(
    encoder: Encoder,
    source: Source,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_workers: int | None = None,
) -> Features:
    """Extract the pooled features ``encoder.pool(encoder(images))`` of every image of a source, in order.

    Args:
        encoder: an encoder with ``preprocess``; moved to ``device``, and in evaluation mode during the pass.
        source, batch_size, device, num_workers: as in :func:`extract_all`.

    Raises:
        ValueError: if the encoder has no preprocessing, or no image can be read.
    """
    preprocess = known_preprocess(encoder)
    reading: dict[str, Any] = {"batch_size": batch_size, "device": device, "num_workers": num_workers}
    with evaluating(encoder.to(device)):
        return extract_all({"x": pooled(encoder)}, source, preprocess, **reading)["x"]


def check_labels(train: Tensor, test: Tensor) -> int:
    """Check the labels of a training and a test set, [n] int64 each, and return the number of classes.

    Raises:
        ValueError: if a set is empty or unlabeled, or the training set has a single class.
    """
    for name, labels in (("training", train), ("test", test)):
        if len(labels) == 0:
            raise ValueError(f"the {name} set is empty")
        if bool((labels < 0).any()):
            raise ValueError(f"the {name} set has no labels: pass --labels folder or --labels column")
    if len(train.unique()) < 2:
        raise ValueError("all training images have the same label: a classifier needs at least two classes")
    return int(max(train.max(), test.max())) + 1


def check_features(train: Features, test: Features) -> int:
    """Check features of a training and a test set, and return the number of classes.

    Raises:
        ValueError: if labels cannot be used, values are not finite, or features differ in width.
    """
    for name, features in (("training", train), ("test", test)):
        if len(features.x) != len(features.labels):
            raise ValueError(f"the {name} set has {len(features.x)} features and {len(features.labels)} labels")
        if not bool(features.x.isfinite().all()):
            raise ValueError(f"features of the {name} set are not finite: the encoder's weights may have diverged")
    if train.x.shape[1] != test.x.shape[1]:
        raise ValueError(f"training features have {train.x.shape[1]} values, test features {test.x.shape[1]}")
    return check_labels(train.labels, test.labels)
