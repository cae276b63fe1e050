"""A warning if other work keeps cores busy that the threads of a training need."""

import functools
import time

import torch

from dmjd.engine.console import Console

_SIDES = 512, 128  # of the matrices of a probe: a millisecond, as the operations of small encoders take

_SECONDS = 0.3, 0.5  # of a probe, and of the one that must confirm it: threads that begin are late once or twice

_LATE = 3.0  # idle machines have 1.1 to 2.5, one busy core of two 5 to 24, two of two 3 to 20


def warn_of_busy_cores(device: torch.device, console: Console) -> None:
    """Warn if the threads of a training on the CPU wait for each other most of the time; once in a process.

    Every operation ends when its last thread does, and a thread that shares its core with other work is late.
    """
    threads, known = torch.get_num_threads(), _are_late.cache_info().currsize > 0
    if device.type == "cpu" and threads > 1 and not known and _are_late():
        console.warn(
            f"other work keeps cores busy, so the {threads} threads of this process wait for each other, which can "
            "make it many times slower. End that work, or set OMP_NUM_THREADS to the number of free cores"
        )


@functools.cache
def _are_late() -> bool:
    """Whether the threads are late, and still are in a second, longer probe."""
    return all(lateness(_probe(seconds)) > _LATE for seconds in _SECONDS)


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
