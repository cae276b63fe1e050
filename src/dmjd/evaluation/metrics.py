"""Metrics: accuracy, intersection over union, average precision."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of other classes that score at least as high as the label: scores [b, classes], labels [b] -> [b] int64.

    Ties and NaN count against the classifier, so that constant scores are not rewarded.
    """
    target = scores.gather(1, labels.unsqueeze(1))  # b, 1
    return scores.shape[1] - 1 - (scores < target).sum(dim=1)


def accuracies(ranks: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy, 0 to 1, from :func:`label_ranks`."""
    return {f"top{k}": int((ranks < k).sum()) / len(ranks) for k in (1, 5)}


def iou_scores(confusion: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Segmentation metrics from a confusion matrix [K, K] of pixels (ground truth by prediction).

    Classes that are neither in the ground truth nor predicted have no IoU and do not count in the mean.

    Returns:
        "miou", "pixel_accuracy", "mean_accuracy" (of the classes in the ground truth), 0 to 1, and "iou" by class name,
        None for classes that have no IoU.
    """
    confusion = confusion.double()
    hits, ground_truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = ground_truth + predicted - hits
    iou = hits / union
    return {
        "miou": float(iou[union > 0].mean()),
        "pixel_accuracy": float(hits.sum() / ground_truth.sum()),
        "mean_accuracy": float((hits / ground_truth)[ground_truth > 0].mean()),
        "iou": {name: float(v) if u > 0 else None for name, v, u in zip(names, iou, union, strict=True)},
    }


# name in torchmetrics: name in results
_NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}


def average_precisions(values: dict[str, Tensor], prefix: str, classes: list[str]) -> dict[str, Any]:
    """Average precisions from torchmetrics: "ap", ..., 0 to 1 or None without objects; and "per_class" by name."""
    scores: dict[str, Any] = {name: _or_none(values[prefix + theirs]) for theirs, name in _NAMES.items()}
    present = values["classes"].reshape(-1).tolist()
    each = values[f"{prefix}map_per_class"].reshape(-1)
    by_class = {classes[int(k)]: _or_none(v) for k, v in zip(present, each, strict=True)}
    return scores | {"per_class": {name: by_class.get(name) for name in classes}}


def _or_none(value: Tensor) -> float | None:
    return float(value) if float(value) >= 0 else None
