"""Muon: orthogonalized updates of weight matrices (Jordan et al. 2024), all matrices of one shape at a time."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dmjd.engine.sharding import divided_like, whole

MOMENTUM = 0.95

_EPS = 1e-7  # of the norm of a matrix, and of AdamW

# Coefficients of the Newton-Schulz steps (https://leloykun.github.io/ponder/muon-opt-coeffs).
_COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]

_LEAST_SIDE, _MOST_ASPECT = 4, 128  # other matrices have no directions to speak of

# Numbers that are orthogonalized together: what fits into the caches of a CPU, and a bound on memory elsewhere.
_CPU_NUMBERS, _DEVICE_NUMBERS = 1 << 21, 1 << 24


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices, and AdamW for tokens, biases, norms and depthwise kernels.

    The updates of matrices are those of ``timm.optim.Muon`` with its defaults, bit for bit on a CPU, and its state can
    be loaded. They are scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate serves both. Matrices
    of one shape are orthogonalized in one batch: less time for small encoders, and fewer kernels. Like torch's fused
    optimizers, it skips a step without waiting for the device if its attribute ``found_inf`` is a tensor that holds 1.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: of AdamW.
        weight_decay: decoupled; for matrices and the rest.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for params in _of_one_shape([p for p in trained if is_matrix(p)]):
                self._orthogonal_step(params, group, skip)
            self._adamw_step([p for p in trained if not is_matrix(p)], group, skip)

    def _orthogonal_step(self, params: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        """Momentum, orthogonalization and update of matrices of one shape."""
        moments = [self._of(p, "momentum_buffer") for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        rate: float | Tensor = group["lr"]
        if skip is not None:
            rate = rate * (1.0 - skip)
            grads = list(torch.where(skip > 0, torch.stack(moments), torch.stack(grads)).unbind())  # no momentum either
        torch._foreach_mul_(params, 1.0 - rate * group["weight_decay"])
        torch._foreach_lerp_(moments, grads, 1.0 - MOMENTUM)
        matrices = torch.stack(moments).flatten(2)  # one alone is not taken as a batch, which would be slower
        matrices = matrices[0] if len(params) == 1 else matrices
        update = zeropower_via_newtonschulz(matrices, len(_COEFFICIENTS), _COEFFICIENTS, eps=_EPS).float()
        update = update.reshape(-1, *params[0].shape)
        scale = get_lr_scale(params[0].flatten(1).shape)
        if isinstance(rate, Tensor):
            torch._foreach_sub_(params, list((update * (rate * scale)).unbind()))
        else:
            torch._foreach_add_(params, list(update.unbind()), alpha=-rate * scale)

    def _adamw_step(self, params: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        """Update of all that is not a matrix."""
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self._of(p, "exp_avg") for p in params],
            [self._of(p, "exp_avg_sq") for p in params],
            [],
            [self._of(p, "step") for p in params],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_EPS,
            maximize=False,
        )

    def _of(self, parameter: Tensor, name: str) -> Tensor:
        """State of a parameter, zero at first."""
        state = self.state[parameter]
        if name not in state:
            zero = torch.zeros((), dtype=torch.float32, device=parameter.device)
            like = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[name] = zero if name == "step" else like
        return state[name]


class ShardedMuon(Muon):
    """Muon for parts of parameters: every process updates the whole of each, one after the other, and keeps its part.

    The memory that it takes is that of the largest parameter, a few times.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for own in group["params"]:
                if own.grad is None:
                    continue
                parameter = nn.Parameter(whole(own))
                parameter.grad = whole(own.grad)
                single = Muon([{"params": [parameter]} | settings])
                single.state[parameter] = {name: whole(value) for name, value in self.state[own].items()}
                single.step()
                own.copy_(divided_like(parameter.detach(), own))
                state = single.state[parameter].items()
                self.state[own] = {name: divided_like(value, own) for name, value in state}


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter is a weight matrix, or a convolution that is one: not a token, bias or depthwise kernel."""
    if parameter.ndim < 2 or 1 in parameter.shape[:2]:
        return False
    sides = (parameter.shape[0], math.prod(parameter.shape[1:]))
    return min(sides) >= _LEAST_SIDE and max(sides) <= _MOST_ASPECT * min(sides)


def _of_one_shape(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of matrices of one shape."""
    shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        shapes[matrix.shape].append(matrix)
    for shape, own in shapes.items():
        most = _CPU_NUMBERS if own[0].device.type == "cpu" else _DEVICE_NUMBERS
        count = max(1, most // shape.numel())
        yield from (own[i : i + count] for i in range(0, len(own), count))
