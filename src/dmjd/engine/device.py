"""Devices and processes: which device to use, Fabric, precision, freed memory on the CPU."""

import ctypes
import os
import platform
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from dmjd.config.fields import DEVICES


def make_fabric(device: str, precision: str) -> Fabric:
    """Fabric for this process: devices and nodes as torchrun or SLURM laid them out, else one device.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "auto" (bf16 on a GPU that has it, else fp32), "fp32", "bf16" or "fp16".

    Raises:
        ValueError: when the device is not there or cannot do the precision.
    """
    device = pick_device(device).type
    keep_freed_memory(device)
    if precision == "auto":
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and device != "cuda":
        raise ValueError(f"fp16 needs a CUDA device (here: {device}); use --precision bf16 or fp32")
    devices, nodes = 1, 1
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        devices = int(os.environ["SLURM_NTASKS"]) // nodes
    word = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(precision)
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        plugins=Autocast(word, device) if word else None,  # type: ignore[arg-type]
        strategy="ddp" if devices * nodes > 1 else "auto",
    )
    fabric.launch()
    return fabric


def seed_device(device: torch.device, seed: int) -> None:
    """What ``torch.manual_seed`` does, for the CPU and one device: that one asks every backend and, where CUDA has not
    started, formats the call stack, which takes longer than the optimizer of a small model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class Autocast(MixedPrecision):
    """Lightning's mixed precision, but batches stay as they are: it would round boxes and raw pixels to 16 bits."""

    def convert_input(self, data: Any) -> Any:
        """The same."""
        return data


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h

SMALL_BLOCK = 1 << 21  # bytes up to which memory is kept where little of it is to be used: the size of a large page


def pick_device(name: str) -> torch.device:
    """The word "cpu", "cuda", or "auto" for CUDA where there is one.

    Raises:
        ValueError: for another word, or CUDA where there is none.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available on this machine; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_freed_memory(device: torch.device | str, up_to: int | None = None) -> bool:
    """Let this process keep the memory that tensors on the CPU free, for the next step to use again.

    By default the C library hands large blocks back to the system at once, which then has to find and clear them page
    by page for the next tensor: a quarter of a training step's time. Only with glibc; elsewhere nothing happens.

    The price is gaps: a block of the same size often does not fit where the last one lay, probably since aligned memory
    is asked for with room to spare.

    Args:
        device: where the tensors are; nothing happens for others than the CPU.
        up_to: keep blocks of at most so many bytes and give larger ones back: less memory, slower. None = keep all.

    Returns:
        whether it took effect.
    """
    if torch.device(device).type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_TRIM_THRESHOLD, -1)
    if up_to is None:
        return bool(kept and libc.mallopt(_M_MMAP_MAX, 0))
    return bool(kept and libc.mallopt(_M_MMAP_THRESHOLD, up_to + 1) and libc.mallopt(_M_MMAP_MAX, 1 << 16))
