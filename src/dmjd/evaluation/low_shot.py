"""Low-shot evaluation: stratified subsets of the labels by seed, mean and standard deviation over seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmjd.config.checks import Bounds, check_float, check_int
from dmjd.rng import STREAM_HOLD_OUT, STREAM_SUBSET, hash64

LOW_SHOT_SEEDS = 3


@dataclass(frozen=True)
class LowShot:
    """Number of labels to use, and number of seeds to average over.

    Attributes:
        per_class: number of images of each class; all images if a class has fewer.
        fraction: fraction of each class, rounded, at least one image. If both are None, all labels are used.
        seeds: number of consecutive seeds, from the evaluation's own; None: 3 on a subset of the labels, else 1.

    Raises:
        ValueError: if both ``per_class`` and ``fraction`` are given, or a number is invalid.
    """

    per_class: int | None = None
    fraction: float | None = None
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("give --labels-per-class or --label-fraction, not both")
        if self.per_class is not None:
            check_int("labels_per_class", self.per_class, Bounds(ge=1))
        if self.fraction is not None:
            check_float("label_fraction", self.fraction, Bounds(gt=0, le=1))
        if self.seeds is not None:
            check_int("seeds", self.seeds, Bounds(ge=1))

    @property
    def few(self) -> bool:
        """Whether a subset of the labels is used."""
        return self.per_class is not None or self.fraction is not None

    def seeds_from(self, seed: int) -> list[int]:
        """The seeds, starting at the evaluation's own."""
        return [seed + i for i in range(self.seeds or (LOW_SHOT_SEEDS if self.few else 1))]

    def rows(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Indices of the images to use from a set with labels [n]: [m] int64, ascending.

        They depend on seed, index and label only. With one seed, a smaller subset is contained in every larger one.
        """
        if not self.few:
            return np.arange(len(labels))
        if self.per_class is not None:
            return stratified(labels, lambda n: min(n, self.per_class or n), STREAM_SUBSET, seed)
        fraction = self.fraction or 1.0
        return stratified(labels, lambda n: max(1, round_half_up(fraction * n)), STREAM_SUBSET, seed)

    def describe(self) -> dict[str, Any]:
        """The settings that are not the default, as JSON types."""
        named = {"labels_per_class": self.per_class, "label_fraction": self.fraction, "seeds": self.seeds}
        return {name: value for name, value in named.items() if value is not None}


ALL_LABELS = LowShot()


def typical_count(labels: np.ndarray) -> int:
    """The number of images of the median class of a set with labels [n]; classes without images do not count."""
    return int(np.median(np.unique(labels, return_counts=True)[1]))


def describe_labels(train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """What labels [n] of a training and of a test set say about a score.

    Returns:
        "labels_per_class": fewest and most images of a class in the training set; "chance": the accuracy, 0 to 1, of
        always predicting the most frequent class of the test set.
    """
    counts, tested = (np.unique(labels, return_counts=True)[1] for labels in (train, test))
    return {
        "labels_per_class": [int(counts.min()), int(counts.max())],
        "chance": float(tested.max() / tested.sum()),
    }


def round_half_up(x: float) -> int:
    """Round to the nearest integer, halves up. ``round`` is not monotonic: it rounds halves to even."""
    return math.floor(x + 0.5)


def stratified(labels: np.ndarray, quota: Any, stream: int, seed: int) -> np.ndarray:
    """Indices of ``quota(count)`` images of each class, drawn by the counter-based hash: [m] int64, ascending."""
    order = hash64(stream, seed, torch.arange(len(labels))).argsort(stable=True).numpy()
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen.append(members[: quota(len(members))])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A stratified part of a training set for choosing settings: [n] bool. Classes with one image are left out.

    Raises:
        ValueError: if no class has two images.
    """
    rows = stratified(labels, lambda n: min(n - 1, max(1, round_half_up(fraction * n))), STREAM_HOLD_OUT, seed)
    if len(rows) == 0:
        raise ValueError("no class has two images, so no part of the training set can be held out: use more labels")
    held = np.zeros(len(labels), dtype=bool)
    held[rows] = True
    return held


def summarize(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean over seeds, with the sample standard deviation as ``<name>_std`` and the results of all seeds as "per_seed".

    Numbers in nested dicts are averaged too. A single result is returned unchanged.
    """
    if len(results) == 1:
        return dict(results[0])
    summary = _means(results)
    numbers = [name for name, value in results[0].items() if isinstance(value, int | float)]
    summary |= {f"{name}_std": statistics.stdev(r[name] for r in results) for name in numbers}
    return summary | {"per_seed": [{"seed": seed} | dict(r) for seed, r in zip(seeds, results, strict=True)]}


def _means(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for name, value in results[0].items():
        if isinstance(value, int | float):
            means[name] = statistics.fmean(r[name] for r in results)
        elif isinstance(value, Mapping):
            means[name] = _means([r[name] for r in results])
    return means
