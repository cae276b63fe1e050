"""What an evaluation needs before it starts: the run's configuration, sets with labels, fresh encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import align_labels
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.registry import create_encoder
from dmjd.evaluation.frozen.features import check_labels
from dmjd.runs.build import LISTING, open_data, open_test_data, read_config


def config_of(run: Path) -> PretrainConfig:
    """A run folder's configuration; the default one for an encoder file, which has no data of its own."""
    return read_config(run) if run.is_dir() or not run.exists() else PretrainConfig()


def given_data(data: str | Path | None, test_data: str | Path | None, labels: str | None) -> dict[str, str]:
    """What the caller says about the data, without what is left to the run."""
    given = {"data": data, "test_data": test_data, "labels": labels}
    return {name: str(value) for name, value in given.items() if value is not None}


def open_sets(
    config: PretrainConfig, run: Path, encoder: Encoder, given: Mapping[str, Any]
) -> tuple[Source, Source, Tensor]:
    """Training and test set, and the test labels [n] as indices into the training set's classes.

    Raises:
        ValueError: for data that is missing, unlabeled, has one class or no test part.
    """
    preprocess = known_preprocess(encoder)
    config = config.replace(
        labels=given.get("labels", config.labels), in_chans=preprocess.in_chans, value_range=preprocess.value_range
    )
    own = "data" not in given
    data = given.get("data", config.data)
    if data is None:
        raise ValueError(f"{run} is no run folder, so it has no data of its own: pass --data")
    test_data = given.get("test_data", config.test_data if own else None)
    train = open_data(config, data, "train", listing=run / LISTING if own else None)
    test = open_test_data(config, data, test_data)
    if test is None:
        raise ValueError(f"{data} has no test part: pass --test-data")
    return train, test, aligned_labels(train, test)


def aligned_labels(train: Source, test: Source) -> Tensor:
    """Labels of the test set as indices into the classes of the training set: [n] int64.

    Raises:
        ValueError: for sets that are empty or unlabeled, a single class, or test classes the training set lacks.
    """
    labels = torch.from_numpy(align_labels(train, test))
    check_labels(torch.as_tensor(train.labels), labels)
    return labels


def fresh_encoder(encoder: Encoder, seed: int, drop_path: float = 0.0) -> Encoder:
    """The same architecture with random weights, in evaluation mode; torch's own random state is left alone."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in encoder.options.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = create_encoder(encoder.name, **options | {"drop_path": drop_path}).eval()
    fresh.preprocess = encoder.preprocess
    return fresh
