"""Which device a word means on this machine."""

import torch

DEVICES = ("auto", "cpu", "cuda")


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
