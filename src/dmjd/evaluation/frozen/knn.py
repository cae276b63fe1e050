"""Weighted k-nearest-neighbor classification on frozen features (Wu et al. 2018, as reported by DINO)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.config.evaluation import NEIGHBORS, KnnConfig
from dmjd.engine.console import tracked
from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.low_shot import typical_count
from dmjd.evaluation.metrics import accuracies, label_ranks

_SIMILARITIES_AT_ONCE = 1 << 26  # floats: 256 MiB


def knn(
    train: Features,
    test: Features,
    *,
    k: int | None = KnnConfig.k,
    temperature: float = KnnConfig.temperature,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Classify by the k nearest training features: each votes for its class with exp(cosine similarity / T).

    Args:
        train, test: labeled features of the same width.
        k: number of neighbors that vote, all training features if there are fewer; None: see
            :meth:`~dmjd.config.evaluation.KnnConfig.resolve`.
        temperature: T; the smaller it is, the more the nearest neighbors count.
        seed: not used, since nothing is random; the other evaluations take one.
        device: device that similarities are computed on.

    Returns:
        {"top1", "top5"}: accuracies from 0 to 1; "top1_by_k": {"1": ..., "5", "10", "20" and k}.

    Raises:
        ValueError: if k or the temperature is not positive, or features are unlabeled or not finite.
    """
    config = KnnConfig(k=k, temperature=temperature)  # raises for invalid settings
    num_classes = check_features(train, test)
    k = config.resolve(typical_count(train.labels.numpy())).k
    assert k is not None
    bank = F.normalize(train.x.to(device), dim=1)  # n, D
    labels = train.labels.to(device)  # n
    chunk = max(1, min(1024, _SIMILARITIES_AT_ONCE // len(bank)))
    counts = sorted({*NEIGHBORS, k})
    ranks: dict[int, list[Tensor]] = {count: [] for count in counts}
    parts = zip(test.x.split(chunk), test.labels.split(chunk), strict=True)
    for x, target in tracked(parts, "nearest neighbors", len(test.x), lambda part: len(part[0])):
        similarity = F.normalize(x.to(device), dim=1) @ bank.T  # b, n
        nearest, index = similarity.topk(min(counts[-1], len(bank)), dim=1)  # b, k; in descending order
        for count in counts:
            votes = _votes(nearest[:, :count], labels[index[:, :count]], temperature, num_classes)  # b, classes
            ranks[count].append(label_ranks(votes, target.to(device)))
    scores = {count: accuracies(torch.cat(parts)) for count, parts in ranks.items()}
    return scores[k] | {"top1_by_k": {str(count): score["top1"] for count, score in scores.items()}}


def _votes(nearest: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Similarities and labels of the neighbors, [b, k] -> votes [b, classes], relative to the nearest one's vote."""
    # Subtracting the maximum does not change the order of classes, and small temperatures do not overflow.
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    return nearest.new_zeros(len(nearest), num_classes).scatter_add_(1, labels, weights)
