"""kNN on features that are half whitened by those of the training set."""

import dataclasses
from typing import Any

from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.frozen.knn import knn
from dmjd.whitening import HalfWhitening


def knn_whitened(train: Features, test: Features, **settings: Any) -> dict[str, Any]:
    """As :func:`~dmjd.evaluation.frozen.knn.knn`, after :class:`~dmjd.whitening.HalfWhitening` of all features."""
    check_features(train, test)
    whiten = HalfWhitening.fit(train.x)
    return knn(*(dataclasses.replace(each, x=whiten(each.x)) for each in (train, test)), **settings)
