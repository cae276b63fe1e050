"""Features and images of a set, for figures that look at the whole of it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmjd.data.cache import first_of_parts
from dmjd.data.eval_loader import EvalLoader, read_all
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.engine.console import tracked
from dmjd.figures.render import to_rgb
from dmjd.nn.modes import evaluating
from dmjd.text import drawable

MAX_LETTERS = 12  # of a class name below an image

_MOST_LETTERS = 18  # of the name of an image


def set_features(encoder: Encoder, source: Source, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Pooled features of images that are evenly spaced over a set.

    Args:
        encoder: an encoder with ``preprocess``.
        source: the images.
        num_candidates: number of images to read; all if the set has fewer.

    Returns:
        Features [n, D] of the readable images among them, and their indices [n] in the set.

    Raises:
        ValueError: if fewer than two images can be read, or features are not finite.
    """
    preprocess, device = known_preprocess(encoder), next(encoder.parameters()).device
    features, index = [torch.empty(0, encoder.embed_dim)], [torch.empty(0, dtype=torch.int64)]
    with evaluating(encoder):
        loader = EvalLoader(source, preprocess, batch_size=64, indices=first_of_parts(len(source), num_candidates))
        for batch in tracked(loader, "features", len(loader), lambda batch: batch.size):
            images = preprocess.normalize(batch.raw.to(device))
            features.append(encoder.encode(images).cpu())
            index.append(batch.index)
    found, rows = torch.cat(features), torch.cat(index)
    if len(rows) < 2:
        raise ValueError(f"{source.name} has fewer than two readable images: there is nothing to compare them with")
    if not bool(found.isfinite().all()):
        raise ValueError(f"features of {source.name} are not finite: the encoder's weights may have diverged")
    return found, rows


def set_images(encoder: Encoder, source: Source, index: Tensor) -> list[tuple[np.ndarray, int]]:
    """RGB images [H, W, 3] of a set, as the encoder sees them, with their indices [n]."""
    raw = read_all(source, known_preprocess(encoder), index.numpy(), num_workers=0).raw
    return list(zip(to_rgb(raw).numpy(), index.tolist(), strict=True))


def class_name(source: Source, index: int) -> str:
    """The class of an image of a set, to be drawn; empty without labels."""
    return drawable(source.class_of(index), MAX_LETTERS)


def image_name(source: Source, index: int) -> str:
    """The name of an image of a set, to be drawn: its file, or its row; of a long one the end, which tells most."""
    name = Path(source.describe(index)).name
    return drawable(name if len(name) <= _MOST_LETTERS else f"...{name[3 - _MOST_LETTERS :]}")


def amount(source: Source, count: int) -> str:
    """How many images of a set were looked at, in words."""
    return f"{count:,} images" if count == len(source) else f"{count:,} of {len(source):,} images"
