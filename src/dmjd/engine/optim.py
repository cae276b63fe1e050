"""Optimizers, learning-rate scale rule and schedule. A schedule is a function of progress, 0 to 1."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dmjd.engine.muon import Muon, ShardedMuon
from dmjd.masking import MaskSampler

BETAS = (0.9, 0.95)

ParameterGroup = dict[str, Any]  # of torch.optim: "params", "weight_decay"; "lr_scale" and "frozen_until" are ours


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Trainable parameters in two groups: weight decay on matrices and tokens, none on 1-D ones (biases, norms)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(groups: Sequence[ParameterGroup], betas: tuple[float, float] = BETAS) -> torch.optim.AdamW:
    """Fused AdamW; the engine sets its learning rate before every step."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, fused=True)


def muon(groups: Sequence[ParameterGroup]) -> Muon:
    """Muon; its AdamW has the betas of :func:`adamw`."""
    is_sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    return (ShardedMuon if is_sharded else Muon)(groups, betas=BETAS)


# name in the configuration -> factory(parameter groups)
OPTIMIZERS: dict[str, Callable[[Sequence[ParameterGroup]], torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon}


def scaled_learning_rate(blr: float, batch_size: int, masks: MaskSampler) -> float:
    """Adaptive learning-rate scale rule (DMJD): lr = blr * B * (p / c) / 256.

    More tokens predicted per image mean more gradient signal per image.

    Args:
        blr: base learning rate.
        batch_size: B, unique images per optimizer step (views not counted).
        masks: sampler with the requested ratios p and c.
    """
    return blr * batch_size * (masks.pred_ratio / masks.mask_ratio) / 256


def warmup_cosine(progress: float, warmup: float, floor: float = 0.0) -> float:
    """Factor on the peak learning rate: linear warm-up from 0, then half a cosine to ``floor``.

    Args:
        progress: progress of the run, clamped to 0..1.
        warmup: progress at the peak.
        floor: factor at the end.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / max(1.0 - warmup, 1e-12)))
    return floor + (1.0 - floor) * cosine


def group_factor(group: ParameterGroup, progress: float, warmup: float) -> float:
    """Factor on the learning rate of a group: its "lr_scale", and 0 until its "frozen_until".

    After that the factor rises linearly over ``warmup``, as at the start of a run.

    Args:
        group: parameter group; both keys may be missing.
        progress: progress of the run, 0 to 1.
        warmup: fraction of the run.
    """
    frozen, scale = group.get("frozen_until", 0.0), group.get("lr_scale", 1.0)
    if not frozen:
        return scale
    return scale * min(1.0, max(0.0, progress - frozen) / max(warmup, 1e-12))


def reserve_state(optimizer: torch.optim.AdamW) -> None:
    """Create AdamW's state now, on the parameters' device, with the values that the first step would create.

    Created in the first step, it would fill the gaps that freed activations leave, and a process that keeps freed
    memory (:func:`dmjd.engine.device.keep_freed_memory`) would need new memory for the activations of the next step.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
