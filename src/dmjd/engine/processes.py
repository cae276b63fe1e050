"""The processes of a run: how they were started, how long they wait for each other, and which one was lost.

"First process" is the one of rank 0, which evaluates and saves while the others wait.
"""

import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from dmjd.data.workers import TIMEOUT, wait_limit
from dmjd.warning import DMJDWarning

# Variables that hold the number of processes of a job, by which a user may expect more than one.
_SIZES = ("SLURM_NTASKS", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # ids of SLURM's batch script and interactive shell lie above

_BEAT_SECONDS = 20.0  # between signs of life of the first process

_DONE, _BUSY, _STOPPED, _FAILED = range(4)  # what the first process tells those that wait for it

_CONNECTION_WORDS = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "NCCL")


T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process of the run ended or does not answer."""


@dataclass(frozen=True)
class Launch:
    """How the processes of a run were started.

    Attributes:
        environment: tells Lightning rank, address and port.
        devices: processes on this machine.
        nodes: machines.
    """

    environment: ClusterEnvironment
    devices: int = 1
    nodes: int = 1

    @property
    def num_processes(self) -> int:
        """Number of processes on all machines."""
        return self.devices * self.nodes


def find_launch() -> Launch:
    """How this process was started: by torchrun, as a task of a SLURM step (``srun``), or alone.

    Lightning's own detection is not used. It takes an allocation of several tasks for as many processes, and waits for
    them forever in a batch script without ``srun``.

    Raises:
        ValueError: if the tasks are not spread evenly over the machines.
    """
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return Launch(TorchElasticEnvironment(), devices, int(os.environ["WORLD_SIZE"]) // devices)
    tasks, nodes = _number("SLURM_NTASKS"), _number("SLURM_NNODES")
    if tasks > 1 and _in_slurm_step():
        if tasks % nodes:
            raise ValueError(f"{tasks} tasks cannot be spread evenly over {nodes} machines: use srun --ntasks-per-node")
        os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)  # Lightning requires it; srun sets it only if given
        return Launch(SLURMEnvironment(), tasks // nodes, nodes)
    return Launch(LightningEnvironment())


def warn_alone() -> None:
    """Warn if a process trains alone, but is part of a job of several."""
    for name in _SIZES:
        if _number(name) > 1:
            warnings.warn(
                f"{name} is {_number(name)}, but neither srun nor torchrun started this process: it trains alone. To "
                "use all of them, start it with 'srun dmjd ...' or 'torchrun -m dmjd ...'",
                DMJDWarning,
                stacklevel=2,
            )
            return


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def _in_slurm_step() -> bool:
    """Whether ``srun`` started this process as one of several; not in a batch script or an interactive shell."""
    step = os.environ.get("SLURM_STEP_ID") or os.environ.get("SLURM_STEPID") or ""
    is_step = step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP
    return is_step and "SLURM_PROCID" in os.environ and "SLURM_PTY_PORT" not in os.environ


@dataclass(frozen=True)
class _Peer:
    """A process of the run."""

    host: str
    pid: int

    def is_dead(self) -> bool:
        """Whether it is known to have ended: it ran on this machine, and is gone or a zombie."""
        if self.host != platform.node():
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return Path("/proc/self").exists()


_peers: list[_Peer] = []  # by rank; like the process group, there is one list in a process

_waiting: list[Any] = []  # the group in which processes wait for the first one


def introduce(num_processes: int) -> None:
    """Exchange host names and process ids, once the processes are connected."""
    group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=wait_limit()))
    table: list[_Peer] = [_Peer("", 0)] * num_processes
    torch.distributed.all_gather_object(table, _Peer(platform.node(), os.getpid()), group=group)
    _peers[:], _waiting[:] = table, [group]


def num_processes() -> int:
    """The number of processes of the run."""
    return max(1, len(_peers))


def gather(value: T) -> list[T]:
    """The values of all processes, by rank. All of them must call it, at the same step."""
    values = [value] * num_processes()
    if _waiting:
        torch.distributed.all_gather_object(values, value, group=_waiting[0])
    return values


def check_same(value: object, what: str, cure: str) -> None:
    """Check that all processes have the same value, as they have with the same files. All of them must call it.

    Args:
        value: to compare.
        what: words for the value, as in "starts at step".
        cure: what to do if they differ.

    Raises:
        ValueError: naming the first process with another value than the first one.
    """
    values = gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"process {rank + 1} of {len(values)} {what} {other}, the first one {what} {values[0]}: {cure}"
            )


def from_first(make: Callable[[], T]) -> T:
    """What a function returns in the first process, in all of them. All must call this; only the first calls ``make``.

    Args:
        make: returns what can be pickled; short, since the others wait for at most :func:`wait_limit` seconds.

    Raises:
        Exception: what ``make`` raises, in the first process; in the others a ValueError with the same text.
    """
    if not _waiting:
        return make()
    made: T | None = None
    error: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            made = make()
        except Exception as raised:
            error = raised
    made, text = gather((made, None if error is None else str(error)))[0]
    if error is not None:
        raise error
    if text is not None:
        raise ValueError(text)
    return cast(T, made)


def explain_loss(error: Exception, seconds: float = 3.0) -> str | None:
    """What an error of the communication between processes means; None for other errors.

    Args:
        error: the error.
        seconds: how long to look for a process that ends.
    """
    is_known = isinstance(error, torch.distributed.DistError)
    if not isinstance(error, RuntimeError) or not (is_known or any(word in str(error) for word in _CONNECTION_WORDS)):
        return None
    until = time.monotonic() + seconds
    while not (lost := [rank for rank, peer in enumerate(_peers) if peer.is_dead()]) and time.monotonic() < until:
        time.sleep(0.1)
    reason = (str(error).splitlines() or ["no reason given"])[0]
    if lost:
        names = ", ".join(f"{rank + 1} of {len(_peers)} (rank {rank}, pid {_peers[rank].pid})" for rank in lost)
        return f"lost process {names}: it was killed or has ended; its own message, if there is one, says why"
    if "imed out" in str(error) or "timeout" in str(error):
        return f"no answer from the other processes for {wait_limit() / 60:g} minutes ({TIMEOUT}): {reason}"
    return f"lost the connection to another process: {reason}"


@contextmanager
def losses_explained() -> Iterator[None]:
    """Context of the work of several processes: the error of one that is left alone says which process was lost.

    Raises:
        LostProcessError: instead of an error of the communication between processes.
    """
    try:
        yield
    except RuntimeError as error:
        if num_processes() == 1 or isinstance(error, LostProcessError) or (loss := explain_loss(error)) is None:
            raise
        raise LostProcessError(loss) from error


@contextmanager
def first_process_works() -> Iterator[None]:
    """Context of work in the first process only, of any length: the others are in :func:`wait_for_first`.

    They hear from it every 20 seconds, so that a first process that died is not waited for.
    """
    if not _waiting:
        yield
        return
    ended, outcome = threading.Event(), _FAILED

    def beat() -> None:
        with suppress(RuntimeError):  # a lost process is reported by the next communication of the main thread
            while not ended.wait(_BEAT_SECONDS):
                _broadcast(_BUSY)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
        outcome = _DONE
    except Exception:
        raise
    except BaseException:
        outcome = _STOPPED
        raise
    finally:
        ended.set()
        thread.join()
        with suppress(RuntimeError):
            _broadcast(outcome)


def wait_for_first() -> bool:
    """Wait for the end of :func:`first_process_works`; False if a signal stopped it.

    Raises:
        LostProcessError: if it failed.
    """
    while (word := _broadcast(_BUSY)) == _BUSY:
        pass
    if word == _FAILED:
        raise LostProcessError("the first process failed; its message says why")
    return word == _DONE


def _broadcast(word: int) -> int:
    """Send a word from the first process to all; returns what it sent."""
    message = torch.tensor(word)
    torch.distributed.broadcast(message, 0, group=_waiting[0])
    return int(message)
