"""A warning if other work keeps cores busy that the threads of a training need."""

import time

import torch

from dmjd.engine.console import Console

_SIDES = 512, 128  # of the matrices of a probe: a millisecond, as the operations of small encoders take

_SECONDS = 0.3, 0.5  # of a probe, and of the one that must confirm it: threads that begin are late once or twice

_LATE = 4.0  # idle machines have 1.1 to 2.5, one busy core of two 5 to 24


def warn_of_busy_cores(device: torch.device, console: Console) -> None:
    """Warn if the threads of a training on the CPU wait for each other most of the time.

    Every operation ends when its last thread does, and a thread that shares its core with other work is late.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1 and all(lateness(_probe(seconds)) > _LATE for seconds in _SECONDS):
        console.warn(
            f"other work keeps cores busy, so the {threads} threads of this training wait for each other, which makes "
            "it many times slower. End that work, or set OMP_NUM_THREADS to the number of free cores (1 always works)"
        )


def lateness(times: list[float]) -> float:
    """Mean time of equal operations, relative to the fast ones, those that nothing delayed (the 10th percentile)."""
    fast = sorted(times)[len(times) // 10]
    return sum(times) / len(times) / fast


def _probe(seconds: float) -> list[float]:
    """Times of equal small operations, in seconds."""
    rows, columns = _SIDES
    x, weight, began = torch.ones(rows, columns), torch.ones(columns, rows), time.perf_counter()
    times: list[float] = []
    while not times or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        torch.nn.functional.gelu(x @ weight)
        times.append(time.perf_counter() - started)
    return times
