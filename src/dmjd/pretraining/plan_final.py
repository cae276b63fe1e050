"""How long the final evaluation of a run with labels will take: measured on a few images, and features like theirs."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dmjd.config.evaluation import PROBE_EPOCHS
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.cache import evenly_spaced
from dmjd.data.sources.base import Source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.evaluation.frozen.features import Features, extract_all, pooled, raw_pixels
from dmjd.evaluation.frozen.knn import knn
from dmjd.evaluation.frozen.linear import linear_probe, probe_schedule
from dmjd.nn.modes import evaluating
from dmjd.runs.build import open_test_data

SECONDS = 5.0  # of encoding

_FEWEST, _MOST = 16, 256  # images that are encoded

_ROWS = 4096  # features that are classified

_STEPS = 20  # of the linear probe

T = TypeVar("T")


def final_seconds(config: PretrainConfig, encoder: Encoder, train: Source, per_image: float) -> float:
    """Seconds of kNN and linear probe of an encoder, of random weights and of pixels; 0 where a run has no such end.

    Args:
        config: of the run.
        encoder: its encoder, on its device.
        train: all its images.
        per_image: expected seconds to read and encode one for the encoder and for random weights.
    """
    if not config.final_eval or config.data is None or train.labels is None:
        return 0.0
    test = open_test_data(config, config.data, config.test_data)
    return 0.0 if test is None or test.labels is None else estimate_final(encoder, train, test, per_image)


def estimate_final(encoder: Encoder, train: Source, test: Source, per_image: float) -> float:
    """:func:`final_seconds` of labeled sets; measures for about ``SECONDS``.

    Args:
        encoder: of the run, on its device.
        train, test: all images.
        per_image: expected seconds to read and encode one for the encoder and for random weights.
    """
    count = max(_FEWEST, min(_MOST, int(SECONDS / per_image)))
    part = SubsetSource(train, evenly_spaced(len(train), count))
    device, N, M = next(encoder.parameters()).device, len(train), len(test)
    extract = pooled(encoder, "fp32")
    kinds = {"encoder": extract, "as slow as it": extract, "pixels": raw_pixels}
    with evaluating(encoder):
        seconds, features = _timed(extract_all, kinds, part, known_preprocess(encoder), device=device)
    seconds *= (N + M) / len(part)
    batch = probe_schedule(N)[0]
    steps = N // batch * PROBE_EPOCHS
    for kind, times in (("encoder", 2), ("pixels", 1)):
        own, other = (_repeated(features[kind], min(rows, _ROWS)) for rows in (N, M))
        by_neighbors, _ = _timed(knn, own, other, device=device)
        by_probe, _ = _timed(linear_probe, own, other, steps=_STEPS, batch_size=batch, device=device)
        seconds += times * (by_neighbors * N * M / (len(own.x) * len(other.x)) + by_probe * steps / _STEPS)
    return seconds


def _timed(work: Callable[..., T], *arguments: Any, **settings: Any) -> tuple[float, T]:
    """The seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    done = work(*arguments, **settings)
    return time.perf_counter() - started, done


def _repeated(features: Features, count: int) -> Features:
    """As many features, made of a few."""
    rows = torch.arange(count) % len(features.x)
    return Features(features.x[rows], features.labels[rows], torch.arange(count))
