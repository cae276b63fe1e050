"""Evaluation with few labels: stratified subsets that follow from a seed, and the mean and spread of their results."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmjd.rng import STREAM_HOLD_OUT, STREAM_SUBSET, hash64

SEEDS_OF_FEW = 3


@dataclass(frozen=True)
class LowShot:
    """How many labels may be used, and over how many seeds the result is taken.

    Attributes:
        per_class: images of each class; a class that has fewer gives all it has. fraction: share of each class,
            rounded, at least one image. Neither: all labels.
        seeds: repetitions, with seeds counted up from the evaluation's own; None: 3 with few labels, else 1.

    Raises:
        ValueError: for both at once, or numbers that cannot be.
    """

    per_class: int | None = None
    fraction: float | None = None
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("give --labels-per-class or --label-fraction, not both")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"labels_per_class must be at least 1, got {self.per_class}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"label_fraction must be greater than 0 and at most 1, got {self.fraction}")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    @property
    def few(self) -> bool:
        """Whether only a part of the labels is used."""
        return self.per_class is not None or self.fraction is not None

    def seeds_from(self, seed: int) -> list[int]:
        """The seeds of all repetitions."""
        return [seed + i for i in range(self.seeds or (SEEDS_OF_FEW if self.few else 1))]

    def rows(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Which images of a set with labels [n] are used: [m] int64, ascending.

        A function of seed, place and label: of one seed, the subset for fewer labels lies in the one for more.
        """
        if not self.few:
            return np.arange(len(labels))
        if self.per_class is not None:
            return stratified(labels, lambda n: min(n, self.per_class or n), STREAM_SUBSET, seed)
        share = self.fraction or 1.0
        return stratified(labels, lambda n: max(1, round_half_up(share * n)), STREAM_SUBSET, seed)

    def describe(self) -> dict[str, Any]:
        """What was asked for, as JSON types; empty for all labels and one seed."""
        named = {"labels_per_class": self.per_class, "label_fraction": self.fraction, "seeds": self.seeds}
        return {name: value for name, value in named.items() if value is not None}


ALL_LABELS = LowShot()


def round_half_up(x: float) -> int:
    """The nearest whole number; unlike ``round``, never down from a half, so that larger shares never give less."""
    return math.floor(x + 0.5)


def stratified(labels: np.ndarray, quota: Any, stream: int, seed: int) -> np.ndarray:
    """``quota(count)`` images of each class, in an order drawn by the counter-based hash: [m] int64, ascending."""
    order = hash64(stream, seed, torch.arange(len(labels))).argsort(stable=True).numpy()
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen.append(members[: quota(len(members))])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def hold_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A part of a training set to choose settings on: [n] bool, stratified; a class of one image gives none.

    Raises:
        ValueError: where no class has two images.
    """
    rows = stratified(labels, lambda n: min(n - 1, max(1, round_half_up(share * n))), STREAM_HOLD_OUT, seed)
    if len(rows) == 0:
        raise ValueError("no class has two images, so no part of the training set can be held out: use more labels")
    held = np.zeros(len(labels), dtype=bool)
    held[rows] = True
    return held


def summarize(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """One result of several seeds: means, ``<name>_std`` (of a sample), and each seed's own under "per_seed".

    Numbers in dicts are averaged in place; a single result is returned as it is.
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
