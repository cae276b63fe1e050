"""Clusters of the images of a set, with typical images of each."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from dmjd.data.sources.base import Source
from dmjd.encoders.base import Encoder
from dmjd.figures.grid import panel_grid
from dmjd.figures.panels import BLANK, Panel
from dmjd.figures.set_features import amount, class_name, set_features, set_images
from dmjd.similarity import centered

MOST_CLUSTERS = 12  # by default: more rows are hard to take in

NUM_IMAGES = 8  # of each cluster

_MANY = 20_000  # images, of which KMeans takes minutes


def default_clusters(num_images: int) -> int:
    """Number of clusters of so many images: the square root of half of them, 2 to 12."""
    return min(MOST_CLUSTERS, max(2, round(math.sqrt(num_images / 2))), num_images)


def find_clusters(unit: np.ndarray, num_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """K-means of unit vectors, by mini-batches if there are very many.

    Args:
        unit: [n, D].
        num_clusters: at most n.
        seed: seed of the first centers.

    Returns:
        Cluster of each image [n], the largest cluster is 0; and distance to the center of its cluster [n].
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans  # slow to import

    kind = KMeans if len(unit) <= _MANY else MiniBatchKMeans
    means = kind(num_clusters, n_init=3, random_state=seed % 2**32).fit(unit)
    sizes = np.bincount(means.labels_, minlength=num_clusters)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    return rank[means.labels_], np.linalg.norm(unit - means.cluster_centers_[means.labels_], axis=1)


def clusters_figure(
    encoder: Encoder,
    source: Source,
    *,
    num_images: int = NUM_IMAGES,
    num_candidates: int = 20_000,
    num_clusters: int | None = None,
    seed: int = 0,
) -> Figure:
    """Draw a row for each cluster, the largest first, with the images nearest to its center.

    Args:
        encoder: an encoder with ``preprocess``; it is not changed.
        source: the images. With labels, the most frequent class of each cluster is named.
        num_images: number of images of each cluster.
        num_candidates: number of images to cluster, evenly spaced over the set.
        num_clusters: number of clusters; None: see :func:`default_clusters`.
        seed: seed of the first centers.

    Raises:
        ValueError: if fewer than two images can be read, or there are fewer images than clusters.
    """
    features, index = set_features(encoder, source, num_candidates)
    count = default_clusters(len(index)) if num_clusters is None else num_clusters
    if count > len(index):
        raise ValueError(f"num_clusters must be at most the number of images, {len(index)}, got {count}")
    cluster, distance = find_clusters(centered(features).numpy(), count, seed)
    members = [np.flatnonzero(cluster == i) for i in range(count)]
    members = [rows[np.argsort(distance[rows], kind="stable")] for rows in members if len(rows)]
    width = min(num_images, len(members[0]))
    rows = []
    for own in members:
        panels = [Panel(image) for image, _ in set_images(encoder, source, index[own[:width]])]
        panels[0] = Panel(panels[0].image, _caption(source, index[own].tolist(), len(index)))
        rows.append(panels + [BLANK] * (width - len(panels)))
    note = (
        f"K-means of {amount(source, len(index))} with {count} clusters, on unit features less their mean. The images "
        "nearest to the center of each cluster, and its number of images."
    )
    return panel_grid([""] * width, rows, note=note)


def _caption(source: Source, indices: Sequence[int], total: int) -> str:
    """Size of a cluster and, with labels, its most frequent class."""
    text = f"{len(indices):,} ({100 * len(indices) / total:.0f} %)"
    if source.labels is None:
        return text
    classes, counts = np.unique(source.labels[list(indices)], return_counts=True)
    most = int(counts.argmax())
    example = next(i for i in indices if source.labels[i] == classes[most])
    return f"{text}\n{100 * counts[most] / len(indices):.0f} % {class_name(source, example) or 'without a label'}"
