"""Images and their nearest neighbors in the feature space of an encoder.

Shapes: n candidate images, D width of a feature.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.figures.grid import panel_grid
from dmjd.figures.panels import Panel
from dmjd.figures.render import to_rgb
from dmjd.figures.set_features import MAX_LETTERS, class_name, set_features, set_images
from dmjd.images.decoding import ImageLike
from dmjd.nn.modes import evaluating
from dmjd.text import drawable
from dmjd.whitening import HalfWhitening

NUM_NEIGHBORS = 7

SAME, OTHER = "#2a9d3a", "#d1495b"  # borders of neighbors of the query's class and of other classes


def nearest(features: Tensor, queries: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most similar images of each query.

    The mean of ``features`` is subtracted from all features first. It is far from zero, so that without this the cosine
    of any two images is close to 1.

    Args:
        features: [n, D], those to search.
        queries: [q, D].
        count: number of neighbors, at most n, or n - 1 with ``own``.
        own: [q] int64, the row of each query in ``features``, which is left out; None: the queries are other images.

    Returns:
        Cosines [q, count], descending, and rows [q, count] int64.
    """
    mean = features.float().mean(dim=0)
    unit, asked = (F.normalize(x.float() - mean, dim=1) for x in (features, queries))
    cosines = asked @ unit.T  # q, n
    if own is not None:
        cosines[torch.arange(len(own)), own] = -torch.inf
    best = cosines.topk(count, dim=1)
    return best.values, best.indices


def neighbors_figure(
    encoder: Encoder,
    source: Source,
    *,
    num_images: int = 4,
    num_candidates: int = 2000,
    seed: int = 0,
    query: Sequence[ImageLike] = (),
) -> Figure:
    """Draw queries in the first column, each with its nearest images by cosine similarity of half-whitened features.

    Args:
        encoder: an encoder with ``preprocess``; it is not changed.
        source: the images; with labels, borders show whether a neighbor has the query's class.
        num_images: number of queries that are drawn from the images.
        num_candidates: number of images to search, evenly spaced over the set.
        seed: seed of the choice of queries.
        query: the queries instead, which need not be in the set.

    Raises:
        ValueError: if fewer than two images can be read, or one of ``query`` cannot.
    """
    preprocess = known_preprocess(encoder)
    given = preprocess.raw(query)  # q, C, H, W
    features, index = set_features(encoder, source, num_candidates)
    whiten = HalfWhitening.fit(features)
    labels: list[int | None] = [None] * len(given)
    features = whiten(features)
    if len(given):
        with evaluating(encoder):
            asked = encoder.encode(preprocess.normalize(given).to(next(encoder.parameters()).device)).cpu()
        cosines, rows = nearest(features, whiten(asked), min(NUM_NEIGHBORS, len(index)))
        first = [Panel(image, _file_name(one)) for image, one in zip(to_rgb(given).numpy(), query, strict=True)]
    else:
        own = torch.from_numpy(np.random.default_rng(seed).permutation(len(index))[:num_images].copy())
        cosines, rows = nearest(features, features[own], min(NUM_NEIGHBORS, len(index) - 1), own)
        first = [Panel(image, class_name(source, i)) for image, i in set_images(encoder, source, index[own])]
        labels = [None if source.labels is None else int(source.labels[i]) for i in index[own].tolist()]
    panels = [
        [one, *_panels(source, set_images(encoder, source, index[found]), values, label)]
        for one, found, values, label in zip(first, rows, cosines.tolist(), labels, strict=True)
    ]
    titles = ["query", *(f"neighbor {i + 1}" for i in range(rows.shape[1]))]
    return panel_grid(titles, panels, note=_note(source, len(index), bool(len(given))))


def _panels(
    source: Source, images: Sequence[tuple[np.ndarray, int]], cosines: Sequence[float], label: int | None
) -> list[Panel]:
    """The neighbors of a query of a class, or of an unknown one: images with their indices in the set, and cosines."""
    panels = []
    for (image, index), cosine in zip(images, cosines, strict=True):
        border = None
        if source.labels is not None and label is not None and min(label, source.labels[index]) >= 0:
            border = SAME if source.labels[index] == label else OTHER
        panels.append(Panel(image, f"{cosine:.3f}  {class_name(source, index)}".rstrip(), border))
    return panels


def _file_name(image: ImageLike) -> str:
    return drawable(Path(image).name, MAX_LETTERS) if isinstance(image, str | Path) else ""


def _note(source: Source, num_candidates: int, given: bool) -> str:
    borders = " Green border: the query's class; red: another class." if source.labels is not None and not given else ""
    return (
        f"Nearest of {num_candidates} images by cosine similarity (the numbers) of pooled features, half whitened: 0 "
        f"is as similar as any two images are on average.{borders}"
    )
