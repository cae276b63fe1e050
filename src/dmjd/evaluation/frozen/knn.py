"""Weighted k-nearest-neighbor classification on frozen features (Wu et al. 2018, as DINO reports it)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.metrics import accuracies, label_ranks

NEIGHBORS = (1, 5, 10, 20)  # always reported

_SIMILARITIES_AT_ONCE = 1 << 26  # floats: 256 MiB


def knn(
    train: Features,
    test: Features,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Each of the k nearest training features by cosine similarity votes for its class with exp(similarity / T).

    Nothing is trained, so there is nothing to tune and nothing random.

    Args:
        train, test: labeled features of the same width.
        k: neighbors that vote; a training set of fewer lets all of them vote.
        temperature: T; small values trust the nearest most.
        device: where the products are computed.

    Returns:
        {"top1", "top5"}: shares of the test set between 0 and 1; "top1_by_k": {"1": ..., "5", "10", "20" and k}.

    Raises:
        ValueError: for k or temperature that are not positive, or features that lack labels or values.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k and temperature must be positive, got k={k} and temperature={temperature}")
    num_classes = check_features(train, test)
    bank = F.normalize(train.x.to(device), dim=1)  # n, D
    labels = train.labels.to(device)  # n
    chunk = max(1, min(1024, _SIMILARITIES_AT_ONCE // len(bank)))
    counts = sorted({*NEIGHBORS, k})
    ranks: dict[int, list[Tensor]] = {count: [] for count in counts}
    for x, truth in zip(test.x.split(chunk), test.labels.split(chunk), strict=True):
        similarity = F.normalize(x.to(device), dim=1) @ bank.T  # b, n
        nearest, who = similarity.topk(min(counts[-1], len(bank)), dim=1)  # b, neighbors, the nearest first
        for count in counts:
            votes = _votes(nearest[:, :count], labels[who[:, :count]], temperature, num_classes)  # b, classes
            ranks[count].append(label_ranks(votes, truth.to(device)))
    found = {count: accuracies(torch.cat(parts)) for count, parts in ranks.items()}
    return found[k] | {"top1_by_k": {str(count): scores["top1"] for count, scores in found.items()}}


def _votes(nearest: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Similarities and labels of the nearest, [b, k] -> [b, classes] summed votes, relative to the very nearest's."""
    # Taking the largest off first changes no order between classes and keeps small temperatures from overflowing.
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    return nearest.new_zeros(len(nearest), num_classes).scatter_add_(1, labels, weights)
