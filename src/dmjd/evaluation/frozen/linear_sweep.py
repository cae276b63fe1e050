"""Many linear probes at once on cached features; the best one on a held-out part of the training set is tested.

The best layer, pooling and learning rate differ between encoders. Choosing them on the test set would overstate the
accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from dmjd.config.evaluation import LinearSweepConfig
from dmjd.encoders.base import Encoder
from dmjd.engine.console import tracked
from dmjd.evaluation.frozen.features import Features, check_features
from dmjd.evaluation.frozen.linear import MAX_BATCH, ProbeBatches, new_linear, probe_schedule
from dmjd.evaluation.low_shot import hold_out
from dmjd.evaluation.metrics import accuracies, label_ranks
from dmjd.nn.layers import TRANSFORMER_NORM_EPS

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)  # factors on the learning rate of the linear probe

HELD_OUT = 0.1  # fraction of each class


class SweepFeatures:
    """Features of several layers and poolings side by side: normalized [b, C, H, W] -> [b, parts * D] float32.

    Uses the transformer blocks at 1/2, 3/4 and all of the depth; from each, the mean and maximum over the patch tokens
    and the class token if there is one. Every part is normalized like the pooled feature.

    Args:
        encoder: an encoder in evaluation mode.
        precision: "fp32" or "bf16" (autocast).

    Attributes:
        parts: names of the parts, in order.
    """

    def __init__(self, encoder: Encoder, precision: str = "fp32") -> None:
        self.encoder, self.precision = encoder, precision
        depth = len(cast(nn.ModuleList, encoder.blocks))
        self.blocks = sorted({max(0, round(depth * fraction) - 1) for fraction in (0.5, 0.75, 1.0)})
        self.class_token = getattr(encoder, "cls_token", None) is not None  # prefix tokens may be registers only
        poolings = ["mean", "max"] + (["class token"] if self.class_token else [])
        self.parts = [f"block {i + 1} of {depth}, {pooling}" for i in self.blocks for pooling in poolings]

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the features of a batch."""
        outputs: list[Tensor] = []
        blocks = cast(nn.ModuleList, self.encoder.blocks)
        hooks = [blocks[i].register_forward_hook(lambda *call: outputs.append(call[-1])) for i in self.blocks]
        try:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                self.encoder(images)
        finally:
            for hook in hooks:
                hook.remove()
        valid = self.encoder.valid_tokens(images)
        parts = [part for tokens in outputs for part in self._pooled(tokens.float(), valid)]
        return torch.cat([F.layer_norm(part, part.shape[1:], eps=TRANSFORMER_NORM_EPS) for part in parts], dim=1)

    @property
    def pooled_part(self) -> tuple[int, int]:
        """(index, number of parts) of the part that is the pooled feature of the other evaluations."""
        depth = self.blocks[-1] + 1
        return self.parts.index(f"block {depth} of {depth}, mean"), len(self.parts)

    def _pooled(self, tokens: Tensor, valid: Tensor | None) -> list[Tensor]:
        """[B, prefix + N, D] -> [B, D] for each pooling, of the tokens that are valid [B, N]."""
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        if valid is not None:
            patches = torch.where(valid.unsqueeze(-1), patches, -torch.inf)
        pooled = [self.encoder.mean_patch_token(tokens, valid), patches.amax(dim=1)]
        return pooled + ([tokens[:, 0]] if self.class_token else [])


@dataclass(frozen=True)
class _Choice:
    """One probe: index of its part of the features, and factor on the learning rate."""

    part: int
    rate: float


def linear_sweep(
    train: Features,
    test: Features,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    blr: float = LinearSweepConfig.blr,
    weight_decay: float = LinearSweepConfig.weight_decay,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train a probe for each part of the features and each learning rate; test the best one on held-out images.

    All probes see the same batches. A tenth of each class is held out. The best probe is trained again on the whole
    training set, and tested. The protocol is that of :func:`~dmjd.evaluation.frozen.linear.linear_probe`.

    Args:
        train, test: labeled features [n, parts * D].
        epochs, steps, blr, weight_decay, seed, device: as in :func:`~dmjd.evaluation.frozen.linear.linear_probe`.

    Returns:
        "top1", "top5": accuracies on the test set. "held_out_top1": accuracy by which the probe was chosen.
        "features", "rate": the chosen part and learning-rate factor. "probes": number of probes.

    Raises:
        ValueError: if settings are invalid, or no part of the training set can be held out.
    """
    config = LinearSweepConfig(epochs=epochs, steps=steps, blr=blr, weight_decay=weight_decay, seed=seed)
    num_classes = check_features(train, test)
    held = torch.from_numpy(hold_out(train.labels.numpy(), HELD_OUT, seed))
    choices = [_Choice(part, rate) for part in range(len(train.parts)) for rate in RATES]
    scores = _Probes(train, ~held, choices, num_classes, config, device).top1(train, held)
    best = max(range(len(choices)), key=lambda i: scores[i])  # the first of equal scores: the smaller learning rate
    final = _Probes(train, torch.ones_like(held), [choices[best]], num_classes, config, device)
    return final.accuracies(test) | {
        "held_out_top1": scores[best],
        "features": train.parts[choices[best].part],
        "rate": choices[best].rate,
        "probes": len(choices),
    }


class _Probes:
    """Linear layers trained side by side on the rows ``chosen`` of a training set.

    Args:
        train: features [n, parts * D].
        chosen: [n] bool.
        choices: one entry per probe.
        config: schedule and seed.
    """

    def __init__(
        self,
        train: Features,
        chosen: Tensor,
        choices: Sequence[_Choice],
        num_classes: int,
        config: LinearSweepConfig,
        device: torch.device | str,
    ) -> None:
        self.choices, self.num_parts, self.device = choices, len(train.parts), device
        generator = torch.Generator().manual_seed(config.seed)
        dim = train.x.shape[1] // self.num_parts
        self.norm = nn.BatchNorm1d(train.x.shape[1], affine=False, eps=1e-6).to(device)
        first = new_linear(dim, num_classes, generator)  # all start from the same weights
        self.linears = nn.ModuleList(new_linear(dim, num_classes, generator) for _ in choices).to(device)
        for linear in self.linears:
            linear.load_state_dict(first.state_dict())
        x, labels = train.x[chosen].to(device), train.labels[chosen].to(device)
        batch, lr = probe_schedule(len(x), None, config.blr)
        batches = ProbeBatches(len(x), max(batch, 2), config.epochs, config.steps, generator)
        self._fit(x, labels, batches, lr, config.weight_decay)

    def _scores(self, x: Tensor) -> list[Tensor]:
        """[b, parts * D] -> logits [b, classes] of each probe."""
        parts = self.norm(x).chunk(self.num_parts, dim=1)
        return [linear(parts[choice.part]) for linear, choice in zip(self.linears, self.choices, strict=True)]

    def _fit(self, x: Tensor, labels: Tensor, batches: ProbeBatches, lr: float, weight_decay: float) -> None:
        """Train all probes. LARS adapts each layer on its own, so they do not influence each other."""
        groups = []
        for linear, choice in zip(self.linears, self.choices, strict=True):
            for parameter in linear.parameters():
                matrix = parameter.ndim > 1
                decay = weight_decay if matrix else 0.0
                groups.append(
                    {"params": [parameter], "weight_decay": decay, "always_adapt": matrix, "lr_scale": choice.rate}
                )
        optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)
        probes = f"{len(self.choices)} linear probes"
        for factor, rows in tracked(batches, probes, batches.steps, unit="steps"):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor * group["lr_scale"]
            rows = rows.to(x.device)
            optimizer.zero_grad()
            torch.stack([F.cross_entropy(s, labels[rows]) for s in self._scores(x[rows])]).sum().backward()
            optimizer.step()
        self.norm.eval()

    def _ranks(self, features: Features) -> Tensor:
        """Ranks of the labels for each probe: [probes, n] int64."""
        with torch.inference_mode():
            ranks = [
                torch.stack([label_ranks(s, target.to(self.device)) for s in self._scores(x.to(self.device))])
                for x, target in zip(features.x.split(MAX_BATCH), features.labels.split(MAX_BATCH), strict=True)
            ]
        return torch.cat(ranks, dim=1)

    def top1(self, features: Features, chosen: Tensor) -> list[float]:
        """Accuracy of each probe on the rows ``chosen`` [n] bool."""
        part = Features(features.x[chosen], features.labels[chosen], features.rows[chosen])
        return [accuracies(ranks)["top1"] for ranks in self._ranks(part)]

    def accuracies(self, features: Features) -> dict[str, float]:
        """Accuracies of the first probe."""
        return accuracies(self._ranks(features)[0])
