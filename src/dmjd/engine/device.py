"""Devices and processes: Lightning Fabric, precision, seeds, and memory freed on the CPU."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy

from dmjd.config.fields import DEVICES, PRECISIONS
from dmjd.config.strategies import DDP, FSDP
from dmjd.data.workers import available_cores, wait_limit
from dmjd.engine.processes import LostProcessError, explain_loss, find_launch, introduce, warn_alone
from dmjd.engine.sharding import ShardedStrategy

SMALL_BLOCK = 1 << 21  # bytes, the size of a huge page: the largest blocks kept if memory use must stay low

_FABRIC_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h


def make_fabric(device: str, precision: str, distributed: bool = True, strategy: str = DDP) -> Fabric:
    """Launch Fabric in this process: devices and nodes as given by torchrun or SLURM, else one device.

    Processes wait for each other for at most :func:`~dmjd.data.workers.wait_limit` seconds.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto" (bf16 on a GPU that supports it, else fp32), "fp32", "bf16" or "fp16".
        distributed: whether several processes may share the work.
        strategy: "ddp" or "fsdp"; of no effect for one process.

    Raises:
        ValueError: if the device is not available or does not support the precision, or for one of several processes
            that must not share the work.
        LostProcessError: if not all processes start.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    device = pick_device(device).type
    keep_freed_memory(device)
    if precision == "auto":
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and device != "cuda":
        raise ValueError(f"fp16 needs a CUDA device (here: {device}); use --precision bf16 or fp32")
    launch = find_launch()
    if launch.num_processes > 1 and not distributed:
        raise ValueError("an evaluation trains on one device: start it without torchrun, in a single task")
    if launch.num_processes == 1 and distributed:
        warn_alone()
    mixed = _FABRIC_PRECISIONS.get(precision)
    processes = ShardedStrategy if strategy == FSDP else DDPStrategy
    fabric = Fabric(
        accelerator=device,
        devices=launch.devices,
        num_nodes=launch.nodes,
        plugins=[launch.environment, *([Autocast(mixed, device)] if mixed else [])],  # type: ignore[arg-type]
        strategy=processes(timeout=timedelta(seconds=wait_limit())) if launch.num_processes > 1 else "auto",
    )
    try:
        fabric.launch()
        if launch.num_processes > 1:
            introduce(launch.num_processes)
    except RuntimeError as error:
        if (loss := explain_loss(error, seconds=0)) is None:
            raise
        raise LostProcessError(f"not all {launch.num_processes} processes started: {loss}") from error
    return fabric


class Autocast(MixedPrecision):
    """Lightning's mixed precision without the cast of the inputs, which would round boxes and raw pixels to 16 bits."""

    def convert_input(self, data: Any) -> Any:
        """Return ``data`` unchanged."""
        return data


# Fabric has no public access to its precision plugin. Only the two functions below use it.


def precision_name(fabric: Fabric) -> str:
    """The name of the precision: "fp32", "bf16" or "fp16"; Lightning's name of any other."""
    theirs = fabric._precision.precision
    return {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}.get(theirs, theirs)


def loss_scaler(fabric: Fabric) -> Any | None:
    """The ``GradScaler`` of fp16, None for other precisions."""
    return getattr(fabric._precision, "scaler", None)


def unscale_gradients(fabric: Fabric, optimizer: torch.optim.Optimizer) -> None:
    """Divide gradients by the loss scale of fp16, once per step.

    Args:
        fabric: with a loss scaler.
        optimizer: the optimizer itself. The scaler knows optimizers by identity: given Fabric's wrapper, the step would
            divide again. Fabric's own function refuses fused optimizers, which the scaler supports.
    """
    scaler = loss_scaler(fabric)
    assert scaler is not None
    scaler.unscale_(optimizer)


def seed_device(device: torch.device, seed: int) -> None:
    """``torch.manual_seed`` for the CPU and one device only.

    torch's function seeds every backend and, if CUDA is not initialized, formats the call stack, which takes longer
    than the optimizer step of a small model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def device_text(device: torch.device | str) -> str:
    """The devices that a training runs on, in words: "NVIDIA H100 80GB HBM3", "8 x NVIDIA H100 80GB HBM3", "CPU, 4
    threads".
    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if torch.device(device).type == "mps":
        return "Apple GPU (MPS)"
    if torch.device(device).type != "cuda":
        threads = processes * torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads > 1)}"
    return (f"{processes} x " if processes > 1 else "") + torch.cuda.get_device_name(device)


def pick_device(name: str) -> torch.device:
    """The device for "cpu", "cuda", "mps" (an Apple GPU), or "auto": CUDA, else MPS, else the CPU.

    Raises:
        ValueError: for an unknown name, or if the device is not available.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got '{name}'")
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        return torch.device(next(each for each, is_there in available.items() if is_there()))
    if not available[name]():
        raise ValueError(f"no {name.upper()} device is available on this machine; use --device auto or cpu")
    return torch.device(name)


def keep_freed_memory(device: torch.device | str, up_to: int | None = None) -> bool:
    """Let this process keep the memory that CPU tensors free, so that the next step reuses it.

    By default the C library returns large blocks to the system at once, and the system has to find and clear them page
    by page for the next tensor: a quarter of the time of a training step. Only with glibc; a no-op elsewhere.

    The price is fragmentation: a block of the same size often does not fit where the last one was.

    Args:
        device: device of the tensors; a no-op for devices other than the CPU.
        up_to: keep blocks of at most this many bytes and return larger ones: less memory, slower. None: keep all.

    Returns:
        Whether it took effect.
    """
    if torch.device(device).type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_TRIM_THRESHOLD, -1)
    if up_to is None:
        return bool(kept and libc.mallopt(_M_MMAP_MAX, 0))
    return bool(kept and libc.mallopt(_M_MMAP_THRESHOLD, up_to + 1) and libc.mallopt(_M_MMAP_MAX, 1 << 16))


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, of the process on a CPU; on MPS the present memory, 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Measure :func:`peak_memory` from now on, where the system can: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def free_memory(device: torch.device) -> None:
    """Give unused memory of a GPU, which may be in pieces, back to it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """CPU, cores, threads and GPU of this machine."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": model, "cores": available_cores(), "threads": torch.get_num_threads(), "gpu": gpu}
