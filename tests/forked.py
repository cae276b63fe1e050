"""Commands in forks of a process that has imported everything: a start takes a second, not ten.

The forks come from a server process that runs no command itself: a fork of a process whose libraries have started
threads may wait for locks of theirs forever.
"""

import multiprocessing.process
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from storm.faults import SLOW_IMPORTS

from dmjd.cli.main import main

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*SLOW_IMPORTS, __name__, "state_files", "dmjd.evaluation.frozen.protocol"])


def start(work: Callable[..., Any], *arguments: Any, log: Path) -> multiprocessing.process.BaseProcess:
    """Call a function in a fork, whose exit code is what it returns. ``log`` gets what it prints to stderr."""
    process = _SERVER.Process(target=_logged, args=(work, arguments, log))
    process.start()
    return process


def run(work: Callable[..., Any], *arguments: Any, log: Path, seconds: float) -> int | None:
    """Call a function in a fork; returns its exit code, None if it did not end in time."""
    process = start(work, *arguments, log=log)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def _logged(work: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # sums over several threads round differently
    code = 1
    try:
        with os.fdopen(2, "w", closefd=False) as sys.stderr, open(os.devnull, "w") as sys.stdout:
            try:
                code = work(*arguments) or 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def execute(program: str, *arguments: object) -> None:
    """Run the text of a program, with its arguments in ``sys.argv[1:]``, as ``python -c`` would. Call it in a fork."""
    sys.argv[1:] = map(str, arguments)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def start_two(work: Callable[..., Any], *arguments: Any, logs: Path) -> list[multiprocessing.process.BaseProcess]:
    """Call a function in two processes as torchrun starts them. They print to ``log0`` and ``log1`` in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(_as_rank, rank, port, work, *arguments, log=logs / f"log{rank}") for rank in range(2)]


def run_two(work: Callable[..., Any], *arguments: Any, logs: Path, seconds: float) -> tuple[list[int | None], str]:
    """:func:`start_two`, to the end: exit codes, None for what did not end in time, and all that was printed."""
    processes = start_two(work, *arguments, logs=logs)
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, "".join((logs / f"log{rank}").read_text() for rank in range(2))


def _as_rank(rank: int, port: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in the environment that torchrun makes for one of two processes."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), str(rank))
    return work(*arguments)


def as_second(paths: dict[str, str], other: dict[str, str], flags: list[str]) -> int:
    """Pre-train as one of two processes, of which the second has other paths."""
    own = paths | other if os.environ["RANK"] == "1" else paths
    return main(["pretrain", "folder", "--data", own["data"], "--out", own["out"], *flags])


def killed_before(name: str, arguments: list[str]) -> int:
    """Run a command that is killed before a file of this name replaces a temporary one. Call it in a fork."""

    def kill(event: str, given: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(given[1]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    return main(arguments)


def rank_killed_before(rank: str, name: str, arguments: list[str]) -> int:
    """Run a command in several processes, of which the one of this rank is as in :func:`killed_before`."""
    return killed_before(name, arguments) if os.environ["RANK"] == rank else main(arguments)
