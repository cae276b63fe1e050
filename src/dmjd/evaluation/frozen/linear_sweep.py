"""Many linear probes at once over cached features; the best on a held-out part of the training set is tested, once.

Which layer, pooling and rate suit an encoder is not known beforehand; tried on the test set, the choice itself would
flatter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from dmjd.encoders.base import Encoder
from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.frozen.linear import MAX_BATCH, ProbeBatches, new_linear, probe_schedule
from dmjd.evaluation.low_shot import hold_out
from dmjd.evaluation.metrics import accuracies, label_ranks
from dmjd.nn.layers import TRANSFORMER_NORM_EPS

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the rate of the plain probe

HELD_OUT = 0.1


class SweepFeatures:
    """Features of several layers and poolings side by side: normalized [b, C, H, W] -> [b, parts * D] float32.

    The transformer blocks at half, three quarters and all of the depth; of each the mean and the maximum over patch
    tokens, and the class token where there is one; every part normalized like the pooled feature.

    Args:
        encoder: in evaluation mode. precision: "fp32" or "bf16" (autocast in its blocks).

    Attributes:
        parts: their names, in order.
    """

    def __init__(self, encoder: Encoder, precision: str = "fp32") -> None:
        self.encoder, self.precision = encoder, precision
        depth = len(cast(nn.ModuleList, encoder.blocks))
        self.blocks = sorted({max(0, round(depth * share) - 1) for share in (0.5, 0.75, 1.0)})
        poolings = ["mean", "max"] + (["class token"] if encoder.num_prefix_tokens else [])
        self.parts = [f"block {i + 1} of {depth}, {pooling}" for i in self.blocks for pooling in poolings]

    def __call__(self, images: Tensor) -> Tensor:
        """See the class."""
        outputs: list[Tensor] = []
        blocks = cast(nn.ModuleList, self.encoder.blocks)
        hooks = [blocks[i].register_forward_hook(lambda *call: outputs.append(call[-1])) for i in self.blocks]
        try:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                self.encoder(images)
        finally:
            for hook in hooks:
                hook.remove()
        parts = [part for tokens in outputs for part in self._pooled(tokens.float())]
        return torch.cat([F.layer_norm(part, part.shape[1:], eps=TRANSFORMER_NORM_EPS) for part in parts], dim=1)

    @property
    def pooled_part(self) -> tuple[int, int]:
        """(place, number of parts): where the feature lies that the other evaluations use."""
        depth = self.blocks[-1] + 1
        return self.parts.index(f"block {depth} of {depth}, mean"), len(self.parts)

    def _pooled(self, tokens: Tensor) -> list[Tensor]:
        """[B, prefix + N, D] -> [B, D] by each pooling."""
        prefix = self.encoder.num_prefix_tokens
        pooled = [self.encoder.mean_patch_token(tokens), tokens[:, prefix:].amax(dim=1)]
        return pooled + ([tokens[:, 0]] if prefix else [])


@dataclass(frozen=True)
class _Choice:
    """One probe: which part of the features, and its rate as a multiple of the plain probe's."""

    part: int
    rate: float


def linear_sweep(
    train: Features,
    test: Features,
    *,
    parts: Sequence[str] = ("features",),
    epochs: int | None = None,
    steps: int | None = None,
    blr: float = 0.1,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train a probe for every part of the features and every rate; test the one that is best on held-out images.

    All probes see the same batches. A tenth of each class is held out; the best probe is then trained again on the
    whole training set, and only that one meets the test set. The protocol of each is :func:`linear_probe`'s.

    Args:
        train, test: labeled features [n, parts * D]. parts: names of the parts, in order.
        epochs, steps, blr, weight_decay, seed, device: as in :func:`~dmjd.evaluation.frozen.linear.linear_probe`.

    Returns:
        {"top1", "top5", "held_out_top1", "features", "rate"}: shares of the test set, that of the held-out part by
        which it was chosen, and what was chosen; "probes": how many there were.

    Raises:
        ValueError: for settings that can't be, or a set of which nothing can be held out.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    num_classes = check_features(train, test)
    held = torch.from_numpy(hold_out(train.labels.numpy(), HELD_OUT, seed))
    choices = [_Choice(part, rate) for part in range(len(parts)) for rate in RATES]
    settings = (num_classes, len(parts), epochs, steps, blr, weight_decay, seed, device)
    scores = _Probes(train, ~held, choices, *settings).top1(train, held)
    best = max(range(len(choices)), key=lambda i: scores[i])  # of equals the first: the smaller rate
    final = _Probes(train, torch.ones_like(held), [choices[best]], *settings)
    return final.accuracies(test) | {
        "held_out_top1": scores[best],
        "features": parts[choices[best].part],
        "rate": choices[best].rate,
        "probes": len(choices),
    }


class _Probes:
    """Linear layers trained side by side on the rows ``chosen`` of a training set.

    Args:
        train: features [n, parts * D]. chosen: [n] bool. choices: the probes. The rest as in :func:`linear_sweep`.
    """

    def __init__(
        self,
        train: Features,
        chosen: Tensor,
        choices: Sequence[_Choice],
        num_classes: int,
        num_parts: int,
        epochs: int | None,
        steps: int | None,
        blr: float,
        weight_decay: float,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.choices, self.num_parts, self.device = choices, num_parts, device
        generator = torch.Generator().manual_seed(seed)
        dim = train.x.shape[1] // num_parts
        self.norm = nn.BatchNorm1d(train.x.shape[1], affine=False, eps=1e-6).to(device)
        first = new_linear(dim, num_classes, generator)  # all begin with the same weights
        self.linears = nn.ModuleList(new_linear(dim, num_classes, generator) for _ in choices).to(device)
        for linear in self.linears:
            linear.load_state_dict(first.state_dict())
        x, labels = train.x[chosen].to(device), train.labels[chosen].to(device)
        batch, lr = probe_schedule(len(x), None, blr)
        batches = ProbeBatches(len(x), max(batch, 2), epochs, steps, generator)
        self._fit(x, labels, batches, lr, weight_decay)

    def _scores(self, x: Tensor) -> list[Tensor]:
        """[b, parts * D] -> logits [b, classes] of each probe."""
        parts = self.norm(x).chunk(self.num_parts, dim=1)
        return [linear(parts[choice.part]) for linear, choice in zip(self.linears, self.choices, strict=True)]

    def _fit(self, x: Tensor, labels: Tensor, batches: ProbeBatches, lr: float, weight_decay: float) -> None:
        """Train all; LARS measures each layer by itself, so they do not influence each other."""
        groups = []
        for linear, choice in zip(self.linears, self.choices, strict=True):
            for parameter in linear.parameters():
                matrix = parameter.ndim > 1
                decay = weight_decay if matrix else 0.0
                groups.append(
                    {"params": [parameter], "weight_decay": decay, "always_adapt": matrix, "lr_scale": choice.rate}
                )
        optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)
        for factor, rows in batches:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor * group["lr_scale"]
            rows = rows.to(x.device)
            optimizer.zero_grad()
            torch.stack([F.cross_entropy(s, labels[rows]) for s in self._scores(x[rows])]).sum().backward()
            optimizer.step()
        self.norm.eval()

    def _ranks(self, features: Features) -> Tensor:
        """[probes, n] int64."""
        with torch.inference_mode():
            ranks = [
                torch.stack([label_ranks(s, truth.to(self.device)) for s in self._scores(x.to(self.device))])
                for x, truth in zip(features.x.split(MAX_BATCH), features.labels.split(MAX_BATCH), strict=True)
            ]
        return torch.cat(ranks, dim=1)

    def top1(self, features: Features, chosen: Tensor) -> list[float]:
        """Accuracy of each probe on the rows ``chosen`` [n] bool."""
        part = Features(features.x[chosen], features.labels[chosen], features.rows[chosen])
        return [accuracies(ranks)["top1"] for ranks in self._ranks(part)]

    def accuracies(self, features: Features) -> dict[str, float]:
        """Of the first probe."""
        return accuracies(self._ranks(features)[0])
