"""Temporary modes: evaluation, and defaults of torch that do not depend on the caller."""

import contextlib
from collections.abc import Iterator
from typing import Any

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
def own_defaults(callers_device: bool = False) -> Iterator[None]:
    """New modules and tensors are float32 and on the CPU, and gradients are on, whatever the caller chose.

    Public functions have it as a decorator, so that weights and results do not depend on ``torch.set_default_dtype``,
    ``torch.set_default_device``, ``torch.no_grad`` or ``torch.inference_mode`` around the call.

    Args:
        callers_device: keep the caller's default device: for functions that make a module and nothing else, which may
            be wanted on a GPU, or on "meta".
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    device = contextlib.nullcontext() if callers_device else _on_cpu()
    try:
        with torch.inference_mode(False), torch.enable_grad(), device:
            yield
    finally:
        torch.set_default_dtype(before)


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
    """The CPU as the default device; only if the caller chose another one, since every call of torch would pass it."""
    try:
        is_default = torch.get_default_device().type == "cpu"
    except (RuntimeError, AssertionError):  # a device that does not exist
        is_default = False
    return contextlib.nullcontext() if is_default else torch.device("cpu")
