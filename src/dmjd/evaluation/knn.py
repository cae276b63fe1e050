"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, as DINO reports it)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.evaluation.features import Features, accuracies, check_features, label_ranks

_SIMILARITIES_AT_ONCE = 1 << 26  # floats: 256 MiB


def knn(
    train: Features,
    test: Features,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Each of the k nearest training features by cosine similarity votes for its class with exp(similarity / T).

    Nothing is trained, so there is nothing to tune and nothing random.

    Args:
        train, test: labelled features of the same width.
        k: neighbours that vote; a training set of fewer lets all of them vote.
        temperature: T; small values trust the nearest most.
        device: where the products are computed.

    Returns:
        {"top1", "top5"}: shares of the test set between 0 and 1.

    Raises:
        ValueError: for k or temperature that are not positive, or features that lack labels or values.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k and temperature must be positive, got k={k} and temperature={temperature}")
    num_classes = check_features(train, test)
    bank = F.normalize(train.x.to(device), dim=1)  # n, D
    labels = train.labels.to(device)  # n
    chunk = max(1, min(1024, _SIMILARITIES_AT_ONCE // len(bank)))
    ranks = []
    for x, truth in zip(test.x.split(chunk), test.labels.split(chunk), strict=True):
        similarity = F.normalize(x.to(device), dim=1) @ bank.T  # b, n
        votes = _votes(similarity, labels, min(k, len(bank)), temperature, num_classes)  # b, classes
        ranks.append(label_ranks(votes, truth.to(device)))
    return accuracies(torch.cat(ranks))


def _votes(similarity: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    """[b, n] similarities -> [b, classes] summed votes, relative to the nearest neighbour's."""
    nearest, who = similarity.topk(k, dim=1)  # b, k
    # Taking the largest off first changes no order between classes and keeps small temperatures from overflowing.
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    return similarity.new_zeros(len(similarity), num_classes).scatter_add_(1, labels[who], weights)
