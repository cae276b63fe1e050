"""Worker processes that read images, on torch's DataLoader."""

import atexit
import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch.utils.data import DataLoader

from dmjd.config.checks import MAX_WORKERS
from dmjd.data.worker_limits import allowed_workers, warn_of_many, without_advice
from dmjd.images.stored import UnreadableImage
from dmjd.system import STOP_SIGNALS
from dmjd.warning import DMJDWarning

_MOST_WORKERS = 8

_PREFETCH = 2  # batches per worker; they lie in shared memory, which is small in containers

_POLL = 1  # seconds between checks of the workers while waiting for a batch

_GRACE = 1.0  # seconds that a worker has to end by itself

_FILES_PER_WORKER = 4 + 3 * _PREFETCH  # open in this process: pipes, and the tensors of its batches

TIMEOUT = "DMJD_TIMEOUT"  # environment variable

Request = TypeVar("Request")

Result = TypeVar("Result")


class LoaderError(RuntimeError):
    """Worker processes that died, or deliver nothing. The message says why, if that is known, and what to change."""


def wait_limit() -> float:
    """The seconds after which a wait for data or for other processes without progress is an error.

    Raises:
        ValueError: if the environment variable ``DMJD_TIMEOUT``, in minutes, is not a positive number.
    """
    text = os.environ.get(TIMEOUT) or "10"
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return 60 * float(text)
    raise ValueError(f"the environment variable {TIMEOUT} must be a number of minutes greater than 0, got '{text}'")


def available_cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_workers(world_size: int = 1) -> int:
    """Data loading processes per training process: the machine's cores divided by its training processes, at most 8."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if world_size > 1 and not local.isdigit():  # a single process may be part of a SLURM job of many tasks
        local = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return max(1, min(available_cores() // max(1, int(local) if local.isdigit() else world_size), _MOST_WORKERS))


def auto_workers_once(num_images: int, few: int) -> int:
    """Data loading processes for one pass over a set: none for up to ``few`` images, read faster than workers start."""
    return 0 if num_images <= few else auto_workers()


def read_batches(
    read: Callable[[Request], Result], requests: Iterable[Request], num_workers: int, pin_memory: bool = False
) -> Iterator[Result]:
    """Yield ``read(request)`` for each request, in order.

    Where the limit of open files or of processes allows fewer workers, fewer read, or this process does; where shared
    memory is full, as in containers that have little of it, batches pass through pipes. Both with a warning.

    Args:
        read: picklable; returns tensors in tuples.
        requests: may be endless; each goes to one worker.
        num_workers: 0: read in this process. Workers end when the iterator is closed, dropped or exhausted, and soon
            after this process does, whatever ended it.
        pin_memory: return tensors in page-locked memory, which is copied to the GPU asynchronously.

    Raises:
        UnreadableImage, OSError, MemoryError: if ``read`` raises it.
        LoaderError: if a worker was killed, or none delivered a batch for :func:`wait_limit` seconds.
        ValueError: for a number of workers out of bounds.
    """
    if not 0 <= num_workers <= MAX_WORKERS:
        raise ValueError(f"num_workers must lie between 0 and {MAX_WORKERS}, got {num_workers}")
    requests = iter(requests)
    workers = None
    if num_workers > available_cores():
        warn_of_many(num_workers, available_cores())
    if num_workers := allowed_workers(num_workers, _FILES_PER_WORKER):
        try:
            workers = _Workers(read, requests, num_workers, pin_memory)
        except OSError as error:  # no memory for another process, too many of them, no semaphores, ...
            _warn(f"data loading processes cannot start ({error.strerror or error}); images are read without them")
    if workers is None:
        for request in requests:
            yield read(request)
        return
    with contextlib.closing(workers):
        while True:
            try:
                batch = workers.next()
            except StopIteration:
                return
            yield batch


def _warn(text: str) -> None:
    warnings.warn(text, DMJDWarning, stacklevel=3)


class _Workers(Generic[Request, Result]):
    """Running worker processes.

    Raises:
        OSError: if they cannot be started.
    """

    def __init__(
        self, read: Callable[[Request], Result], requests: Iterator[Request], num_workers: int, pin_memory: bool
    ) -> None:
        self._num_workers = num_workers
        self._warned: set[str] = set()
        # Workers watch one end of a pipe: they end when the other one is closed, by this process or by its death.
        watched, self._lifeline = multiprocessing.Pipe(duplex=False)
        with without_advice():
            loader = self._loader(read, requests, pin_memory, watched)
        others = set(multiprocessing.active_children())
        try:
            with _without_child_signal(), _stop_signals_held(), without_advice():
                self._running = [iter(loader)]  # the only reference: dropping it ends the workers
        except OSError as error:
            self._lifeline.close()
            _drop_frames(error)
            raise
        finally:
            watched.close()
        self._processes: list[BaseProcess] = list(set(multiprocessing.active_children()) - others)
        # At exit, multiprocessing would send a SIGTERM, which workers ignore, and wait. This runs earlier.
        atexit.register(self.close)

    def _loader(
        self, read: Callable[[Request], Result], requests: Iterator[Request], pin_memory: bool, watched: Connection
    ) -> DataLoader[Any]:
        return DataLoader(
            _Batches(read),  # type: ignore[arg-type]
            batch_sampler=requests,  # type: ignore[arg-type]
            num_workers=self._num_workers,
            prefetch_factor=_PREFETCH,
            collate_fn=_unchanged,
            worker_init_fn=_Start(watched, self._lifeline),
            pin_memory=pin_memory,
            timeout=_POLL,
            # A fork server would die of a signal to the process group, and its children do not inherit our signal mask.
            multiprocessing_context="spawn" if multiprocessing.get_start_method() == "forkserver" else None,
            # Without it the loader would draw a seed from the global generator, which dropout and drop path use.
            generator=torch.Generator().manual_seed(0),
        )

    def next(self) -> Result:
        """The next batch; StopIteration after the last one."""
        waited = 0.0  # counted, not measured: a suspended process must not take its sleep for a stall
        while True:
            try:
                batch, problem = next(self._running[0])
                break
            except (RuntimeError, OSError, EOFError) as error:  # the latter: what a dying worker sent is lost
                timed_out = "timed out" in str(error)
                if (dead := self._dead_worker(0.0 if timed_out else 1.0)) is not None:
                    raise LoaderError(_cause_of_death(dead)) from None
                if not timed_out:
                    raise
            waited += _POLL
            if waited >= wait_limit():
                self._stalled()
        if problem and problem not in self._warned:
            self._warned.add(problem)
            _warn(problem)
        if isinstance(batch, Exception):
            raise batch
        return batch

    def _dead_worker(self, seconds: float) -> BaseProcess | None:
        """A worker that did not end by itself; waits so long for one to die."""
        until = time.monotonic() + seconds
        while True:
            if dead := [process for process in self._processes if process.exitcode]:
                return dead[0]
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _stalled(self) -> NoReturn:
        raise LoaderError(
            f"none of {self._num_workers} data loading process(es) delivered a batch for {wait_limit() / 60:g} "
            f"minute(s): a disk or network folder may hang. Try --num-workers 0, or a longer {TIMEOUT} (in minutes)"
        )

    def close(self) -> None:
        """End the workers, those that hang in a read too."""
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            # Nobody takes it out again: it ends all workers. Processes started later may have inherited this end, so
            # closing it is not enough.
            self._lifeline.send_bytes(b".")
            self._lifeline.close()
        self._running.clear()


@contextlib.contextmanager
def _without_child_signal() -> Iterator[None]:
    """Undo torch's handler of SIGCHLD, which raises an error anywhere, such as in the middle of an optimizer step."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    previous = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Hold back signals that request an end, from this thread until the end, from processes until they accept them.

    A process inherits the mask, also through ``exec``. Without it a signal to the process group would kill a worker
    that has no handlers yet, and with it the run. Windows has no such mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if multiprocessing.get_start_method() != "fork":
            from multiprocessing import resource_tracker  # Unix only

            resource_tracker.ensure_running()  # needed by other workers; before Python 3.13 its start ends the mask
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _drop_frames(error: OSError) -> None:
    """Delete torch's half-made iterator, which the frames of an error hold; its destructor prints a traceback."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook


def _cause_of_death(process: BaseProcess) -> str:
    """What ended a worker, the likely cause, and the cure."""
    code, name = process.exitcode or 0, f"a data loading process (pid {process.pid})"
    if code >= 0:
        return f"{name} ended with exit code {code}; --num-workers 0 reads without such processes"
    signal_name = signal.Signals(-code).name
    cures = {
        "SIGKILL": "was killed, probably because memory ran out; lower --num-workers or --batch-size",
        "SIGBUS": "crashed, probably because shared memory is full; enlarge it (docker run --shm-size 8g), or "
        "lower --num-workers or --batch-size",
    }
    cure = cures.get(signal_name, "ended; if it happens again, --num-workers 0 shows whether an image causes it")
    return f"{name} {cure} (signal {signal_name})"


@dataclass(frozen=True)
class _Packed:
    """A pickled object that unpickles to the object itself."""

    content: bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.content,)


class _Batches(Generic[Request, Result]):
    """A dataset for the loader, of pairs (result or error, problem to warn about).

    Errors are returned, because raised ones would change their type. Results are pickled here, which moves tensors to
    shared memory: if it failed in the thread that sends them, the main process would wait forever.
    """

    def __init__(self, read: Callable[[Request], Result]) -> None:
        self._read = read
        self._problem = ""

    def __getitems__(self, request: Request) -> _Packed:
        try:
            result: Result | Exception = self._read(request)
        except (UnreadableImage, OSError, MemoryError) as error:
            result = error
        if not self._problem:
            try:
                return _Packed(bytes(ForkingPickler.dumps((result, ""))))
            except (RuntimeError, OSError) as error:  # from now on by value: what was shared and not sent is lost
                self._problem = _sharing_problem(error)
        return _Packed(pickle.dumps((result, self._problem)))


def _sharing_problem(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
        cause, cure = "too many files are open", "raise ulimit -n"
    elif "No space left" in str(error):
        cause, cure = (
            "shared memory (/dev/shm) is full",
            "enlarge it (docker run --shm-size 8g), or lower --num-workers",
        )
    else:
        cause, cure = f"shared memory cannot be used ({str(error).splitlines()[0]})", "check /dev/shm"
    return f"{cause}, so batches pass through pipes, which is slower; {cure}"


def _unchanged(batch: Result) -> Result:
    return batch


@dataclass(frozen=True)
class _Start:
    """Prepares a worker process: signals, threads, and the watch for the end of its parent.

    Ctrl-C, a closed terminal and a cluster's SIGTERM reach the whole process group. They are left to the training
    process, which ends its workers after saving. A second SIGTERM ends the worker.
    """

    watched: Connection
    lifeline: Connection

    def __call__(self, _: int) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        torch.set_num_threads(1)
        self.lifeline.close()  # the inherited copy: only the parent's may be open
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            self.watched.poll(None)
        time.sleep(_GRACE)
        os._exit(0)
