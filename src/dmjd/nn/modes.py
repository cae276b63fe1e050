"""Temporary modes: evaluation, and float32 as the type of new tensors."""

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
def float32_by_default() -> Iterator[None]:
    """New modules and tensors are float32, whatever the caller chose with ``torch.set_default_dtype``.

    Public functions have it as a decorator, so that weights and results do not depend on the caller's choice.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
