"""Worker processes that read images, on torch's DataLoader."""

import atexit
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

_MOST_WORKERS = 8

_PREFETCH = 2  # batches per worker; they lie in shared memory, which containers keep small


def available_cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_workers(world_size: int = 1) -> int:
    """Reading processes for one training process: this machine's cores shared out, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world_size)
    return max(1, min(available_cores() // max(1, local), _MOST_WORKERS))


def read_batches(dataset: Any, requests: Iterable[Any], num_workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """``dataset.__getitems__(request)`` of each request, in order.

    Args:
        dataset: picklable, with ``__getitems__`` that takes one request and returns tensors in tuples.
        requests: may be endless; each goes to one worker.
        num_workers: 0: read in this process. Workers end when the iterator is closed, dropped or exhausted.
        pin_memory: return tensors in page-locked memory, for copies to the GPU that do not stop the host.
    """
    if num_workers == 0:
        for request in requests:
            yield dataset.__getitems__(request)
        return
    loader = DataLoader(
        dataset,
        batch_sampler=requests,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # Its own generator: the loader would draw its seed from the global one, which dropout and drop path use.
        generator=torch.Generator().manual_seed(0),
    )
    running = [iter(loader)]  # the only reference: the workers are ended when it goes
    # At exit, multiprocessing would send a SIGTERM, which workers outlive, and wait; this is called before.
    atexit.register(running.clear)
    try:
        while True:
            try:
                batch = next(running[0])
            except StopIteration:
                return
            yield batch
    finally:
        running.clear()
        atexit.unregister(running.clear)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Leave signals to the training process, which ends its workers after it has saved.

    Ctrl-C and a cluster's SIGTERM reach the whole process group, and a worker that dies of them takes the training
    process along. A second SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    torch.set_num_threads(1)
