"""Preparation of an evaluation: the configuration of the run and labeled data sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.config.pretrain import PretrainConfig
from dmjd.config.sources import data_text
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels
from dmjd.data.statistics import warn_of_range
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.weights import is_shared
from dmjd.evaluation.frozen.features import check_labels
from dmjd.runs.build import LISTING, open_data, open_test_data, read_config


def config_of(run: Path) -> PretrainConfig:
    """The configuration of a run folder; the default one for an encoder file or a shared encoder."""
    return read_config(run) if not is_shared(run) and (run.is_dir() or not run.exists()) else PretrainConfig()


def given_data(data: str | Path | None, test_data: str | Path | None, labels: str | None) -> dict[str, str]:
    """The data settings given by the caller, as strings."""
    given = {"data": data, "test_data": test_data, "labels": labels}
    return {name: str(value) for name, value in given.items() if value is not None}


def open_sets(
    config: PretrainConfig, run: Path, encoder: Encoder, given: Mapping[str, Any]
) -> tuple[Source, Source, Tensor]:
    """Open training and test set, and return the test labels [n] as indices into the training classes.

    Raises:
        ValueError: if the data is missing, unlabeled, has a single class or no test part.
    """
    preprocess = known_preprocess(encoder)
    config = config.replace(
        labels=given.get("labels", config.labels), in_chans=preprocess.in_chans, value_range=preprocess.value_range
    )
    own = "data" not in given
    data = given.get("data", config.data)
    if data is None:
        raise ValueError(f"{run} is not a run folder, so it has no data of its own: pass --data")
    test_data = given.get("test_data", config.test_data if own else None)
    train = open_data(config, data, "train", listing=run / LISTING if own else None)
    test = open_test_data(config, data, test_data)
    if test is None:
        raise ValueError(f"{data_text(data)} has no test part: pass --test-data")
    if not own or "test_data" in given:
        warn_of_range(test if own else train)
    return train, test, aligned_labels(train, test)


def aligned_labels(train: Source, test: Source) -> Tensor:
    """Labels of the test set as indices into the classes of the training set: [n] int64.

    Raises:
        ValueError: if a set is empty or unlabeled, there is a single class, or the training set lacks a test class.
    """
    labels = torch.from_numpy(align_labels(train, test))
    check_labels(torch.as_tensor(train.labels), labels)
    return labels
