"""Scores: accuracy, intersection over union, average precision."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes score as high as the true one or higher: scores [b, classes], labels [b] -> [b] int64.

    A tie or a score that is no number counts against the classifier, so that constant scores earn nothing.
    """
    truth = scores.gather(1, labels.unsqueeze(1))  # b, 1
    return scores.shape[1] - 1 - (scores < truth).sum(dim=1)


def accuracies(ranks: Tensor) -> dict[str, float]:
    """Shares of images whose label is the first guess, and among the first five."""
    return {f"top{k}": int((ranks < k).sum()) / len(ranks) for k in (1, 5)}


def iou_scores(confusion: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Scores of a confusion matrix [K, K] (true by predicted) of pixels.

    Intersection over union of each class over the whole set; a class that neither is there nor is predicted has none
    and does not count in the mean.

    Returns:
        "miou", "pixel_accuracy", "mean_accuracy" (of the classes that are there), 0 to 1, and "iou" by name (None
        where there is none).
    """
    confusion = confusion.double()
    hits, truth, said = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = truth + said - hits
    iou = hits / union
    return {
        "miou": float(iou[union > 0].mean()),
        "pixel_accuracy": float(hits.sum() / truth.sum()),
        "mean_accuracy": float((hits / truth)[truth > 0].mean()),
        "iou": {name: float(v) if u > 0 else None for name, v, u in zip(names, iou, union, strict=True)},
    }


# torchmetrics' name: ours
_SCORES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}


def average_precisions(values: dict[str, Tensor], prefix: str, classes: list[str]) -> dict[str, Any]:
    """torchmetrics' values under our names: "ap" and others, 0 to 1 or None where no object is, and "per_class"."""
    scores: dict[str, Any] = {ours: _or_none(values[prefix + theirs]) for theirs, ours in _SCORES.items()}
    present = values["classes"].reshape(-1).tolist()
    each = values[f"{prefix}map_per_class"].reshape(-1)
    by_class = {classes[int(k)]: _or_none(v) for k, v in zip(present, each, strict=True)}
    return scores | {"per_class": {name: by_class.get(name) for name in classes}}


def _or_none(value: Tensor) -> float | None:
    return float(value) if float(value) >= 0 else None
