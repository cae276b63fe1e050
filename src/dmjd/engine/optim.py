"""Optimizers, learning-rate scale rule and schedule. A schedule is a function of progress, 0 to 1."""

import math
from collections.abc import Callable

import torch
from timm.optim import Muon
from torch import nn

from dmjd.masking import MaskSampler

BETAS = (0.9, 0.95)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: weight decay on matrices and tokens, none on 1-D ones (biases, norms)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float] = BETAS) -> torch.optim.AdamW:
    """Fused AdamW over :func:`parameter_groups`; the engine sets its learning rate before every step."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=betas, fused=True)


def muon(model: nn.Module, weight_decay: float) -> Muon:
    """Muon over :func:`parameter_groups`: updates of weight matrices are orthogonalized (Jordan et al. 2024).

    timm's implementation: tokens, biases, norms and depthwise kernels are left to AdamW, and updates of matrices are
    scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate and one scale rule serve both.
    """
    return Muon(parameter_groups(model, weight_decay), lr=0.0, betas=BETAS)


# name in the configuration -> factory(model, weight_decay)
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon}


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
