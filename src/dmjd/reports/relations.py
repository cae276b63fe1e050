"""How the images of a sample relate to each other: neighbors, near duplicates, outliers, clusters, confusions.

Shapes: n images, D width of a feature, k neighbors.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmjd.figures.neighbors import nearest

MOST_COMPARED = 5000  # images that are compared with each other

DUPLICATE_COSINE = 0.95  # of centered features

NUM_NEIGHBORS = 10

_OUTLIER_NEIGHBORS = 5  # mean over as many

NUM_CLUSTERS = 10

MOST_CLASSES = 50  # of a confusion matrix


@dataclass(frozen=True)
class Neighbors:
    """The nearest other images of each image.

    Attributes:
        cosines: [n, k] of the features that were given, less their mean, descending.
        rows: [n, k] int64.
    """

    cosines: Tensor
    rows: Tensor


def find_neighbors(features: Tensor) -> Neighbors:
    """The nearest among the first :data:`MOST_COMPARED` of [n, D] features, n at least 2."""
    compared = features[:MOST_COMPARED]
    n = len(compared)
    return Neighbors(*nearest(compared, compared, min(NUM_NEIGHBORS, n - 1), torch.arange(n)))


def near_duplicates(found: Neighbors) -> list[tuple[int, int, float]]:
    """Pairs (row, other row, cosine) above :data:`DUPLICATE_COSINE`, most similar first."""
    pairs: dict[tuple[int, int], float] = {}
    above = (found.cosines > DUPLICATE_COSINE).nonzero().tolist()
    for row, column in above:
        other = int(found.rows[row, column])
        pairs[min(row, other), max(row, other)] = float(found.cosines[row, column])
    ordered = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    return [(*pair, pairs[pair]) for pair in ordered]


def outliers(found: Neighbors, most: int) -> list[tuple[int, float]]:
    """(row, mean cosine to its nearest neighbors), least similar first."""
    means = found.cosines[:, :_OUTLIER_NEIGHBORS].mean(dim=1)
    values, rows = means.topk(min(most, len(means)), largest=False)
    return list(zip(rows.tolist(), values.tolist(), strict=True))


def clusters(features: Tensor, seed: int = 0) -> np.ndarray | None:
    """[n, D] -> cluster of each image, [n] int64 from the largest on; None for too few images."""
    if len(features) < 5 * NUM_CLUSTERS:
        return None
    from sklearn.cluster import MiniBatchKMeans  # slow to import

    found = MiniBatchKMeans(NUM_CLUSTERS, n_init=3, random_state=seed).fit_predict(features.numpy())
    order = {cluster: place for place, (cluster, _) in enumerate(Counter(found.tolist()).most_common())}
    return np.array([order[cluster] for cluster in found.tolist()], dtype=np.int64)


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    Attributes:
        percent: [c, c], rows are ground-truth classes and sum to 100.
        classes: [c] indices of the classes.
        accuracy: 0 to 1.
        k: neighbors that voted.
        count: images.
    """

    percent: np.ndarray
    classes: list[int]
    accuracy: float
    k: int
    count: int


def neighbor_confusion(found: Neighbors, labels: np.ndarray) -> Confusion | None:
    """Classify each image by the majority of its nearest neighbors, the nearest of equal ones first.

    Args:
        found: the neighbors of n images.
        labels: [n or more] int64; images with -1 have none, and do not count.

    Returns:
        The matrix of the most frequent classes; None if there is a single class.
    """
    own = labels[: len(found.rows)]
    known = own >= 0
    if len(set(own[known].tolist())) < 2:
        return None
    votes = own[found.rows.numpy()]  # n, k
    predicted = np.array(
        [Counter(v for v in row if v >= 0).most_common(1)[0][0] if max(row) >= 0 else -1 for row in votes.tolist()]
    )
    classes = sorted(label for label, _ in Counter(own[known].tolist()).most_common(MOST_CLASSES))
    place = {label: number for number, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)))
    for truth, prediction in zip(own.tolist(), predicted.tolist(), strict=True):
        if truth in place and prediction in place:
            counts[place[truth], place[prediction]] += 1
    totals = np.array([max(1, int((own == label).sum())) for label in classes])
    accuracy = float((predicted == own)[known].mean())
    return Confusion(100 * counts / totals[:, None], classes, accuracy, found.rows.shape[1], int(known.sum()))
