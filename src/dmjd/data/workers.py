"""Worker processes that read images, on torch's DataLoader."""

import atexit
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from dmjd.images.stored import UnreadableImage

_MOST_WORKERS = 8

_PREFETCH = 2  # batches per worker; they lie in shared memory, which is small in containers

Request = TypeVar("Request")

Result = TypeVar("Result")


def available_cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_workers(world_size: int = 1) -> int:
    """Data loading processes per training process: the machine's cores divided by its training processes, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world_size)
    return max(1, min(available_cores() // max(1, local), _MOST_WORKERS))


def auto_workers_once(num_images: int, few: int) -> int:
    """Data loading processes for one pass over a set: none for up to ``few`` images, read faster than workers start."""
    return 0 if num_images <= few else auto_workers()


def read_batches(
    read: Callable[[Request], Result], requests: Iterable[Request], num_workers: int, pin_memory: bool = False
) -> Iterator[Result]:
    """Yield ``read(request)`` for each request, in order.

    Args:
        read: picklable; returns tensors in tuples.
        requests: may be endless; each goes to one worker.
        num_workers: 0: read in this process. Workers end when the iterator is closed, dropped or exhausted.
        pin_memory: return tensors in page-locked memory, which is copied to the GPU asynchronously.

    Raises:
        UnreadableImage: if ``read`` raises it.
    """
    if num_workers == 0:
        for request in requests:
            yield read(request)
        return
    loader: DataLoader[Any] = DataLoader(
        _Batches(read),  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=_PREFETCH,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # Without it the loader would draw a seed from the global generator, which dropout and drop path use.
        generator=torch.Generator().manual_seed(0),
    )
    running = [iter(loader)]  # the only reference: dropping it ends the workers
    # At exit, multiprocessing would send a SIGTERM, which workers ignore, and wait. This runs earlier.
    atexit.register(running.clear)
    try:
        while True:
            try:
                batch = next(running[0])
            except StopIteration:
                return
            if isinstance(batch, UnreadableImage):
                raise batch
            yield batch
    finally:
        running.clear()
        atexit.unregister(running.clear)


@dataclass(frozen=True)
class _Batches(Generic[Request, Result]):
    """A dataset for the loader. Returns an UnreadableImage instead of raising it: a worker would change its type."""

    read: Callable[[Request], Result]

    def __getitems__(self, request: Request) -> Result | UnreadableImage:
        try:
            return self.read(request)
        except UnreadableImage as error:
            return error


def _unchanged(batch: Result) -> Result:
    return batch


def _start_worker(_: int) -> None:
    """Leave signals to the training process, which ends its workers after saving.

    Ctrl-C and a cluster's SIGTERM reach the whole process group, and a worker that dies of them kills the training
    process too. A second SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    torch.set_num_threads(1)
