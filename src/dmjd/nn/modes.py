"""Temporary modes: evaluation, and defaults of torch that do not depend on the caller."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. The mode of every submodule is restored, so frozen parts stay frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """New modules and tensors are float32, and gradients are on, whatever the caller chose.

    Public functions have it as a decorator, so that weights and results do not depend on ``torch.set_default_dtype``,
    ``torch.no_grad`` or ``torch.inference_mode`` around the call.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)
