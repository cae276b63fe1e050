"""Which device a word means on this machine, and how the CPU's memory is kept."""

import ctypes
import platform

import torch

DEVICES = ("auto", "cpu", "cuda")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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


def keep_freed_memory(device: torch.device | str) -> bool:
    """Let this process keep the memory that tensors on the CPU free, for the next step to use again.

    By default the C library hands large blocks back to the system at once, which then has to find and clear them page
    by page for the next tensor: a quarter of a training step's time. Only with glibc; elsewhere nothing happens.

    Args:
        device: where the tensors are; nothing happens for others than the CPU.

    Returns:
        whether it took effect.
    """
    if torch.device(device).type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
