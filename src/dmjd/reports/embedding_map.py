"""Maps of features in two dimensions, as data for an interactive figure.

Shapes: n images of a sample, D width of a feature.
"""

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmjd.reports.clock import Clock
from dmjd.reports.relations import clusters
from dmjd.reports.sample import OTHER, Sample, grouped, sprite

MOST_TSNE = 2000

_TSNE_SECONDS = 0.02  # of an image on one slow core

_FEWEST_TSNE = 200  # a map of fewer images tells nothing that principal components do not

_TSNE_STEPS = 500

_LONGEST_NAME = 80  # characters

MOST_GROUPS = 20  # colors


def principal_components(features: Tensor) -> tuple[np.ndarray, float]:
    """[n, D] -> the first two components [n, 2], and the fraction of the variance they hold."""
    centered = features.double() - features.double().mean(dim=0)
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    total = float(values.clamp(min=0).sum())
    held = float(values[-2:].clamp(min=0).sum()) / total if total > 0 else 0.0
    basis = vectors.flip(-1)[:, :2]
    points = (centered @ basis).float().numpy()
    return (points if points.shape[1] == 2 else np.pad(points, ((0, 0), (0, 1)))), held


def t_sne(features: Tensor, seed: int = 0) -> np.ndarray:
    """[n, D], n at least 4 -> [n, 2]; takes seconds to a minute."""
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE

    x = features.numpy()
    if x.shape[1] > 50:  # as its authors advise
        x = PCA(min(50, len(x)), random_state=seed).fit_transform(x)
    perplexity = min(30.0, (len(x) - 1) / 3)
    found: np.ndarray = TSNE(
        2, init="pca", perplexity=perplexity, max_iter=_TSNE_STEPS, random_state=seed
    ).fit_transform(x)
    return found


def map_data(sample: Sample, clock: Clock, seed: int = 0) -> dict[str, Any]:
    """Points, colors, names and thumbnails of a sample, as JSON types."""
    points, held = principal_components(sample.features)
    views = [{"name": "PCA", "note": f"{100 * held:.0f} % of the variance", **_packed(points)}]
    count = min(MOST_TSNE, len(sample.features))
    if clock.limited:
        count = min(count, int(clock.left / 2 / _TSNE_SECONDS))
    if count >= min(_FEWEST_TSNE, len(sample.features)) and count >= 4:
        views.append({"name": "t-SNE", "note": f"of {count:,} images", **_packed(t_sne(sample.features[:count], seed))})
    sheet, across = sprite(sample.tiles)
    return {
        "count": len(sample.features),
        "views": views,
        "colorings": _colorings(sample, seed),
        "names": [_shortened(name) for name in sample.names],
        "sprite": sheet,
        "across": across,
        "tiles": len(sample.tiles),
        "tile": sample.tiles.shape[1],
    }


def _shortened(name: str) -> str:
    """The end of a long name, which tells more than its beginning; control characters are shown as escapes later."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _packed(points: np.ndarray) -> dict[str, Any]:
    """Points [n, 2] as 16-bit integers: 1 to 65535 from the lowest to the highest value of each axis."""
    low, high = points.min(axis=0), points.max(axis=0)
    whole = np.rint((points - low) / np.maximum(high - low, 1e-12) * 65535).astype("<u2")
    return {"x": _base64(whole[:, 0]), "y": _base64(whole[:, 1]), "count": len(points)}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _colorings(sample: Sample, seed: int) -> list[dict[str, Any]]:
    """Ways to color the points: by label, by folder, by cluster."""
    found: list[tuple[str, list[str], np.ndarray]] = []
    if sample.labels is not None:
        names = [sample.source.class_of(i) or "no label" for i in sample.index.tolist()]
        groups = grouped(names, MOST_GROUPS)
        if groups is not None:
            found.append(("label", *groups))
    folders = sample.folders()
    if folders is not None and not {*folders[0]} - {OTHER} <= {*sample.source.classes}:  # folders that are the labels
        found.append(("folder", *folders))
    if (cluster := clusters(sample.features, seed)) is not None:
        found.append(("cluster", [f"cluster {i + 1}" for i in range(int(cluster.max()) + 1)], cluster))
    return [
        {"name": name, "groups": groups, "of": _base64(numbers.astype(np.uint8))} for name, groups, numbers in found
    ]
