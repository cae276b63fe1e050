"""Images and their nearest neighbors in the feature space of an encoder.

Shapes: n candidate images, D width of a feature.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dmjd.data.cache import first_of_parts
from dmjd.data.eval_loader import EvalLoader, read_all
from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.engine.console import tracked
from dmjd.figures.grid import panel_grid
from dmjd.figures.panels import Panel
from dmjd.figures.render import to_rgb
from dmjd.nn.modes import evaluating
from dmjd.text import drawable

NUM_NEIGHBORS = 7

SAME, OTHER = "#2a9d3a", "#d1495b"  # borders of neighbors of the query's class and of other classes

_MAX_LETTERS = 12  # of a class name below an image


def nearest(features: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most similar images of each query, except the query itself.

    Args:
        features: [n, D].
        queries: [q] int64, rows of ``features``.
        count: number of neighbors, at most n - 1.

    Returns:
        Cosines [q, count], descending, and rows [q, count] int64.
    """
    unit = F.normalize(features.float(), dim=1)
    cosines = unit[queries] @ unit.T  # q, n
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    best = cosines.topk(count, dim=1)
    return best.values, best.indices


def neighbors_figure(
    encoder: Encoder, source: Source, *, num_images: int = 4, num_candidates: int = 2000, seed: int = 0
) -> Figure:
    """Draw queries in the first column, each with its nearest images by cosine similarity of pooled features.

    Args:
        encoder: an encoder with ``preprocess``; it is not changed.
        source: the images; with labels, borders show whether a neighbor has the query's class.
        num_images: number of queries.
        num_candidates: number of images to search, evenly spaced over the set.
        seed: seed of the choice of queries.

    Raises:
        ValueError: if fewer than two images can be read.
    """
    features, index = _features(encoder, source, first_of_parts(len(source), num_candidates))
    if len(index) < 2:
        raise ValueError(f"{source.name} has fewer than two readable images: there are no neighbors to show")
    queries = torch.from_numpy(np.random.default_rng(seed).permutation(len(index))[:num_images].copy())
    cosines, rows = nearest(features, queries, min(NUM_NEIGHBORS, len(index) - 1))
    shown = index[torch.cat([queries.unsqueeze(1), rows], dim=1)]  # q, 1 + k
    images = read_all(source, known_preprocess(encoder), shown.flatten().numpy(), num_workers=0)
    rgb = to_rgb(images.raw).unflatten(0, shown.shape)  # q, 1 + k, H, W, 3
    titles = ["query" if i == 0 else f"neighbor {i}" for i in range(rgb.shape[1])]
    rows_of_panels = [
        _panels(source, panels.numpy(), ids, values)
        for panels, ids, values in zip(rgb, shown.tolist(), cosines.tolist(), strict=True)
    ]
    return panel_grid(titles, rows_of_panels, note=_note(source, len(index)))


def _panels(source: Source, images: np.ndarray, indices: list[int], cosines: list[float]) -> list[Panel]:
    """A query and its neighbors: RGB images [1 + k, H, W, 3], indices of the images in the set, k cosines."""
    names = [_class_name(source, i) for i in indices]
    panels = [Panel(images[0], names[0])]
    for image, index, name, cosine in zip(images[1:], indices[1:], names[1:], cosines, strict=True):
        border = None
        if source.labels is not None:
            border = SAME if source.labels[index] == source.labels[indices[0]] else OTHER
        panels.append(Panel(image, f"{cosine:.3f}  {name}".rstrip(), border))
    return panels


def _features(encoder: Encoder, source: Source, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Pooled features [n, D] of the readable images among ``indices`` and their indices [n] in the set."""
    preprocess, device = known_preprocess(encoder), next(encoder.parameters()).device
    features, index = [torch.empty(0, encoder.embed_dim)], [torch.empty(0, dtype=torch.int64)]
    with evaluating(encoder):
        loader = EvalLoader(source, preprocess, batch_size=64, indices=indices)
        for batch in tracked(loader, "features", len(loader), lambda batch: batch.size):
            images = preprocess.normalize(batch.raw.to(device))
            features.append(encoder.pool(encoder(images)).cpu())
            index.append(batch.index)
    return torch.cat(features), torch.cat(index)


def _class_name(source: Source, index: int) -> str:
    return drawable(source.classes[source.labels[index]], _MAX_LETTERS) if source.labels is not None else ""


def _note(source: Source, num_candidates: int) -> str:
    borders = " Green border: the query's class; red: another class." if source.labels is not None else ""
    return f"Nearest of {num_candidates} images by cosine similarity (the numbers) of pooled features.{borders}"
