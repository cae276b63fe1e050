"""Settings shared by all evaluations, and settings of the evaluations on frozen features. Imports no torch."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from dmjd.config.checks import MAX_BATCH_SIZE, MAX_COUNT, MAX_EPOCHS, MAX_FACTOR, MAX_SEED, MAX_WORKERS, check_text
from dmjd.config.fields import (
    CACHE_SETTINGS,
    DEVICES,
    FEATURE_PRECISIONS,
    LABELS,
    LIST_SETTINGS,
    SPLITS,
    Config,
    option,
)
from dmjd.config.remote import cache_dir_option, cache_gb_option
from dmjd.suggest import did_you_mean
from dmjd.text import printable

PROBE_EPOCHS = 90  # published length of a linear probe

NEIGHBORS = (1, 5, 10, 20)  # numbers of neighbors of a kNN whose results are always reported

COMMON = "evaluation"  # group of settings such as data, folders and device, which do not define the task


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Where an evaluation reads, writes and runs."""

    data: str | None = option(None, "training set; default the data of the run", COMMON)
    test_data: str | None = option(None, "test set of the same form; default the test part of --data", COMMON)
    split: str = option("test", "part to evaluate on: test, or val", COMMON, choices=("test", "val"))
    out: str | None = option(None, "folder for evaluation/TASK.json; default the run folder", COMMON)
    num_workers: int | None = option(
        None, "data loading processes; default by the number of cores", COMMON, ge=0, most=MAX_WORKERS
    )
    seed: int = option(0, "seed of random weights, training and subsets", COMMON, ge=-MAX_SEED, le=MAX_SEED)
    device: str = option("auto", "device to evaluate on", COMMON, choices=DEVICES)

    def to_dict(self) -> dict[str, Any]:
        """The task's own settings as JSON types, as they are stored with a result."""
        return self.own(super().to_dict())

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """The task's own settings among ``names``, as JSON types: what the caller changed."""
        settings = self.to_dict()
        return {name: settings[name] for name in names if name in settings}

    @classmethod
    def own(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The subset of settings that define the task, without those about where to read, write and run."""
        common = {field.name for field in dataclasses.fields(cls) if field.metadata["group"] == COMMON}
        return {name: value for name, value in options.items() if name not in common}


@dataclass(frozen=True, kw_only=True)
class LabeledConfig(EvaluationConfig):
    """An evaluation on image labels, all of them or a stratified subset."""

    labels: str | None = option(None, "source of the labels; default that of the run", COMMON, choices=LABELS)
    label_column: str | None = option(None, "column of the labels in a table or list, instead of label", COMMON)
    path_column: str | None = option(None, "column of the paths in a list, instead of path", COMMON)
    root: str | None = option(None, "folder that the paths in a list are relative to; default its own", COMMON)
    max_unreadable: float | None = option(
        None, "how many files of a list may be missing, or a share below 1; default none", COMMON, ge=0, most=MAX_COUNT
    )
    cache_dir: str | None = cache_dir_option(COMMON)
    cache_gb: float | None = cache_gb_option(COMMON)
    labels_per_class: int | None = option(None, "use this many labels of each class", COMMON, ge=1, most=MAX_COUNT)
    label_fraction: float | None = option(None, "use this fraction of the labels of each class", COMMON, gt=0, le=1)
    seeds: int | None = option(
        None, "number of seeds; default 3 on a subset of the labels, else 1", COMMON, ge=1, most=1000
    )
    baseline: tuple[str, ...] | None = option(
        None,
        "trained models to compare with, by the same protocol: timm/NAME, local-dir:FOLDER, runs or encoder files",
        COMMON,
    )

    @classmethod
    def of_images(
        cls, data: str | Path | None, split: str, labels: str | None, lists: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Which images to read and how, checked: those of the settings that are given, and the split.

        Raises:
            ValueError: if a setting is invalid, or one of ``lists`` is unknown.
        """
        names = (*LIST_SETTINGS, *CACHE_SETTINGS)
        if unknown := [name for name in lists if name not in names]:
            raise ValueError(f"there is no setting {printable(unknown[0])}{did_you_mean(unknown[0], names)}")
        config = cls(data=None if data is None else check_text("data", data), labels=labels, **lists)
        given = {name: getattr(config, name) for name in ("data", "labels", *names)}
        if config.label_column is not None and labels is None:
            given["labels"] = "column"
        return {name: value for name, value in given.items() if value is not None} | {
            "split": check_text("split", split, SPLITS)
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels_per_class is not None and self.label_fraction is not None:
            raise ValueError("give --labels-per-class or --label-fraction, not both")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(LabeledConfig):
    """Settings shared by all evaluations on frozen features, which run in one pass over the images."""

    task: ClassVar[str] = "frozen"

    batch_size: int = option(256, "images per batch of the feature extraction", COMMON, ge=1, most=MAX_BATCH_SIZE)
    precision: str = option("fp32", "precision of the feature extraction", COMMON, choices=FEATURE_PRECISIONS)

    def resolve(self, labels_per_class: int) -> Self:
        """Fill in the defaults for a training set with this many labels of its median class."""
        return self


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FrozenConfig):
    """Weighted k-nearest-neighbor classification."""

    task: ClassVar[str] = "knn"

    k: int | None = option(
        None,
        "neighbors that vote; default 20, or 10, 5 or 1: at most the labels of the median class. The JSON has all four",
        "task",
        ge=1,
        most=100_000,
    )
    temperature: float = option(0.07, "temperature of the votes", "task", gt=0, most=MAX_FACTOR)

    def resolve(self, labels_per_class: int) -> Self:
        """With fewer labels of a class than neighbors, most votes would come from other classes."""
        fitting = max(k for k in NEIGHBORS if k <= max(1, labels_per_class))
        return self if self.k is not None else self.replace(k=fitting)


@dataclass(frozen=True, kw_only=True)
class WhitenedKnnConfig(KnnConfig):
    """Weighted k-nearest-neighbor classification on half-whitened features."""

    task: ClassVar[str] = "knn_whitened"


@dataclass(frozen=True, kw_only=True)
class LinearConfig(FrozenConfig):
    """Linear probe; the batch size follows the size of the training set."""

    task: ClassVar[str] = "linear"

    epochs: int | None = option(
        None, f"epochs over the features; default {PROBE_EPOCHS}", "task", ge=1, most=MAX_EPOCHS
    )
    steps: int | None = option(None, "length in steps, instead of epochs", "task", ge=1, most=MAX_COUNT)
    blr: float = option(0.1, "base learning rate", "task", gt=0, most=MAX_FACTOR)
    weight_decay: float = option(0.0, "weight decay of the linear layer", "task", ge=0, most=MAX_FACTOR)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give --epochs or --steps, not both")


@dataclass(frozen=True, kw_only=True)
class LinearSweepConfig(LinearConfig):
    """Linear probes on several layers, poolings and learning rates."""

    task: ClassVar[str] = "linear_sweep"
