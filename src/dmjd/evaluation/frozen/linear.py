"""Linear probe on frozen features: the protocol of MAE, with a schedule that also suits sets smaller than ImageNet."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from dmjd.config.checks import MAX_FACTOR, Bounds, check_float, check_int
from dmjd.config.evaluation import PROBE_EPOCHS, LinearConfig
from dmjd.engine.console import tracked
from dmjd.engine.optim import warmup_cosine
from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.metrics import accuracies, label_ranks

WARMUP = 10 / PROBE_EPOCHS  # as a fraction of the steps

MAX_BATCH, MIN_BATCH = 4096, 16

BATCHES_PER_EPOCH = 24

FULL_SIZE = 500_000  # images; for larger sets the published learning rate is used unchanged


def probe_schedule(num_train: int, batch_size: int | None = None, blr: float = LinearConfig.blr) -> tuple[int, float]:
    """Batch size and peak learning rate for a training set of ``num_train`` features.

    Each LARS step changes the weights by about ``0.001 * lr`` of their norm, and lr is proportional to the batch, so
    the total change in a run is proportional to epochs * images * blr. The published values (batch 4096, blr 0.1,
    90 epochs) suffice on ImageNet. On 12,000 images they end after 180 steps, 14 points below logistic regression.
    Below ``FULL_SIZE`` images the learning rate is therefore raised in proportion, and the batch is 1/24 of the set,
    so that single steps stay stable:

        batch = num_train / 24, within 16 .. 4096;    lr = blr * batch / 256 * max(1, 500,000 / max(num_train, 24 * 16))

    Args:
        num_train: size of the training set.
        batch_size: overrides the batch size; limited by the size of the set.
        blr: base learning rate.

    Returns:
        (batch size, peak learning rate).

    Raises:
        ValueError: if the batch size or learning rate is not positive.
    """
    blr = check_float("blr", blr, Bounds(gt=0, most=MAX_FACTOR))
    if batch_size is not None:
        batch_size = check_int("batch_size", batch_size, Bounds(ge=1))
    batch = batch_size or max(MIN_BATCH, min(MAX_BATCH, num_train // BATCHES_PER_EPOCH))
    batch = min(batch, num_train)
    boost = max(1.0, FULL_SIZE / max(num_train, BATCHES_PER_EPOCH * MIN_BATCH))
    return batch, blr * batch / 256 * boost


def linear_probe(
    train: Features,
    test: Features,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    blr: float = LinearConfig.blr,
    weight_decay: float = LinearConfig.weight_decay,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Train one linear layer on frozen features and test it.

    BatchNorm without affine (eps 1e-6), then a linear layer (weights normal with std 0.01, bias zero), cross-entropy,
    LARS (momentum 0.9, trust coefficient 0.001, biases not adapted), linear warm-up over 1/9 of the steps, then cosine
    decay to zero. Unlike in the published protocol, features are computed once, from the center crop, without
    augmentation. Batch size and learning rate depend on the size of the training set, see :func:`probe_schedule`.

    Args:
        train, test: labeled features of the same width.
        epochs: passes over the training features, 90 by default.
        steps: optimizer steps, instead of epochs.
        batch_size: images per step; None: by the size of the training set.
        blr: base learning rate.
        weight_decay: weight decay of the weights of the linear layer.
        seed: seed of initial weights and order; equal seeds give equal results on the same device.
        device: device to train on.

    Returns:
        {"top1", "top5"}: accuracies from 0 to 1.

    Raises:
        ValueError: if settings are invalid, or features are unlabeled or not finite.
    """
    LinearConfig(epochs=epochs, steps=steps, blr=blr, weight_decay=weight_decay)  # raises for invalid settings
    num_classes = check_features(train, test)
    if len(train.x) < 2:
        raise ValueError("a linear probe needs at least two training images")
    batch, lr = probe_schedule(len(train.x), batch_size, blr)
    generator = torch.Generator().manual_seed(seed)
    batches = ProbeBatches(len(train.x), max(batch, 2), epochs, steps, generator)
    probe = _probe(train.x.shape[1], num_classes, generator).to(device)
    _fit(probe, train.x.to(device), train.labels.to(device), batches, lr, weight_decay)
    with torch.inference_mode():
        scores = [probe.eval()(x.to(device)) for x in test.x.split(MAX_BATCH)]  # b, classes each
    return accuracies(label_ranks(torch.cat(scores), test.labels.to(device)))


def new_linear(dim: int, num_classes: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with the published initialization: weights normal with std 0.01, bias zero."""
    linear = nn.utils.skip_init(nn.Linear, dim, num_classes)  # the default one draws from the global random state
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


def _probe(dim: int, num_classes: int, generator: torch.Generator) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), new_linear(dim, num_classes, generator))


class ProbeBatches:
    """Batches of row indices for a probe; the last, smaller batch of an epoch is dropped.

    Args:
        num_train: number of features.
        batch: batch size.
        epochs, steps: length, one of them or neither (90 epochs).
        generator: source of the order.
    """

    def __init__(
        self, num_train: int, batch: int, epochs: int | None, steps: int | None, generator: torch.Generator
    ) -> None:
        self._num_train, self._batch, self._generator = num_train, min(batch, num_train), generator
        self.steps = steps or num_train // self._batch * (epochs or PROBE_EPOCHS)

    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        """(learning-rate factor, rows [batch] int64) of each step."""
        step = 0
        while step < self.steps:
            order = torch.randperm(self._num_train, generator=self._generator)
            for rows in order[: self._num_train // self._batch * self._batch].split(self._batch):
                if step < self.steps:
                    yield warmup_cosine(step / self.steps, WARMUP), rows
                step += 1


def _fit(
    probe: nn.Sequential, x: Tensor, labels: Tensor, batches: ProbeBatches, lr: float, weight_decay: float
) -> None:
    """Train the probe in place."""
    linear = probe[1]
    groups = [
        {"params": [linear.weight], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [linear.bias], "weight_decay": 0.0, "always_adapt": False},
    ]
    optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)
    for factor, rows in tracked(batches, "linear probe", batches.steps, unit="steps"):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        rows = rows.to(x.device)
        optimizer.zero_grad()
        F.cross_entropy(probe(x[rows]), labels[rows]).backward()
        optimizer.step()
    # Otherwise every image would get the same class, without a word.
    if not bool(torch.isfinite(cast(Tensor, linear.weight)).all()):
        raise ValueError(f"the linear probe diverged at the learning rate {lr:g}: use a smaller --blr")
