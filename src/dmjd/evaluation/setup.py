"""Preparation of an evaluation: the configuration of the run and labeled data sets."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.config.evaluation import LabeledConfig
from dmjd.config.fields import CACHE_SETTINGS, LIST_SETTINGS
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.sources import data_text, stored_data
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels, has_split
from dmjd.data.sources.subset import labeled_images
from dmjd.data.statistics import warn_of_range
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.weights import is_shared
from dmjd.evaluation.frozen.features import check_labels
from dmjd.runs.build import LISTING, open_data, open_test_data, read_config
from dmjd.warning import DMJDWarning


def config_of(run: Path) -> PretrainConfig:
    """The configuration of a run folder; the default one for an encoder file or a shared encoder."""
    return read_config(run) if not is_shared(run) and (run.is_dir() or not run.exists()) else PretrainConfig()


def given_data(config: LabeledConfig) -> dict[str, Any]:
    """The data settings given by the caller, as JSON types."""
    given = {
        "data": config.data,
        "test_data": config.test_data,
        "split": config.split if config.split != "test" else None,
        "labels": config.labels,
        "label_column": config.label_column,
        "path_column": config.path_column,
        "root": config.root,
        "max_unreadable": config.max_unreadable,
        "cache_dir": config.cache_dir,
        "cache_gb": config.cache_gb,
    }
    return {name: value for name, value in given.items() if value is not None}


def recorded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :func:`given_data` that a result records: where copies of remote files lie does not matter to it."""
    kept = {name: value for name, value in given.items() if name not in CACHE_SETTINGS}
    return kept | {name: stored_data(kept[name]) for name in ("data", "test_data") if name in kept}


def open_sets(
    config: PretrainConfig, run: Path, encoder: Encoder, given: Mapping[str, Any]
) -> tuple[Source, Source, Tensor]:
    """Open training and test set, and return the test labels [n] as indices into the training classes.

    Images without a label are left out.

    Raises:
        ValueError: if the data is missing, unlabeled, has a single class or no test part.
    """
    config, own, split = _reading(config, encoder, given), "data" not in given, given.get("split", "test")
    data = given.get("data", config.data)
    if data is None:
        raise ValueError(f"{run} is not a run folder, so it has no data of its own: pass --data")
    test_data = given.get("test_data", config.test_data if own else None)
    train = open_data(config, data, "train", listing=run / LISTING if own else None)
    test = open_test_data(config, data, test_data, split)
    if test is None:
        cure = "pass --test-data" if split == "test" else "it has no val/ or rows of this split"
        raise ValueError(f"{data_text(data)} has no {split} part: {cure}")
    if not own or "test_data" in given:
        warn_of_range(test if own else train)
    train, test = (_with_labels(source) for source in (train, test))
    return train, test, aligned_labels(train, test)


def open_validation(
    config: PretrainConfig, encoder: Encoder, given: Mapping[str, Any], train: Source, test: Source
) -> tuple[Source, Tensor] | None:
    """The validation part of the data, and its labels [n] as indices into the training classes.

    None if there is none, or if it is what the encoder is evaluated on.
    """
    data = given.get("data", config.data)
    if test.split == "val" or data is None or not has_split(data, "val"):
        return None
    val = _with_labels(open_data(_reading(config, encoder, given), data, "val"))
    return val, aligned_labels(train, val)


def _reading(config: PretrainConfig, encoder: Encoder, given: Mapping[str, Any]) -> PretrainConfig:
    """The configuration of the run with the encoder's preprocessing, and with the data settings that are given."""
    preprocess = known_preprocess(encoder)
    own = config if "data" not in given else config.replace(**dict.fromkeys(LIST_SETTINGS))
    changes = {name: given[name] for name in ("labels", *LIST_SETTINGS, *CACHE_SETTINGS) if name in given}
    if "label_column" in given:
        changes.setdefault("labels", "column")
    names = ("in_chans", "value_range", "nodata", "alpha")
    return own.replace(**{name: getattr(preprocess, name) for name in names}, **changes)


def _with_labels(source: Source) -> Source:
    """A set without the images that have no label, about which it warns."""
    labeled = labeled_images(source)
    if len(labeled) < len(source):
        warnings.warn(
            f"{len(source) - len(labeled)} of {len(source)} images of {source.title} have no label and are left out",
            DMJDWarning,
            stacklevel=5,
        )
    return labeled


def aligned_labels(train: Source, test: Source) -> Tensor:
    """Labels of the test set as indices into the classes of the training set: [n] int64.

    Raises:
        ValueError: if a set is empty or unlabeled, there is a single class, or the training set lacks a test class.
    """
    labels = torch.from_numpy(align_labels(train, test))
    check_labels(torch.as_tensor(train.labels), labels)
    return labels
