"""kNN on features that are half whitened by those of the training set."""

import dataclasses
from typing import Any

import torch

from dmjd.config.evaluation import WhitenedKnnConfig
from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.frozen.knn import knn
from dmjd.whitening import HalfWhitening


def knn_whitened(
    train: Features,
    test: Features,
    *,
    k: int | None = WhitenedKnnConfig.k,
    temperature: float = WhitenedKnnConfig.temperature,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """As :func:`~dmjd.evaluation.frozen.knn.knn`, after :class:`~dmjd.whitening.HalfWhitening` of all features."""
    check_features(train, test)
    whiten = HalfWhitening.fit(train.x)
    train, test = (dataclasses.replace(each, x=whiten(each.x)) for each in (train, test))
    return knn(train, test, k=k, temperature=temperature, seed=seed, device=device)
