"""Which device a word means on this machine, and how the CPU's memory is kept."""

import ctypes
import platform

import torch

DEVICES = ("auto", "cpu", "cuda")
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
