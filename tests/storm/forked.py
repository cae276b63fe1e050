"""Commands of ``state_files`` in forks of a process that has imported everything, each with a time limit.

The forks come from a server process that runs no command itself: a fork of a process whose libraries have started
threads may wait for locks of theirs forever.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storm.faults import SLOW_IMPORTS

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*SLOW_IMPORTS, __name__, "state_files", "dmjd.evaluation.frozen.protocol"])


def run(work: Callable[..., Any], *arguments: Any, log: Path, seconds: float) -> int | None:
    """Call a function in a fork; returns its exit code, None if it did not end in time. ``log`` gets its output."""
    process = _SERVER.Process(target=_logged, args=(work, arguments, log))
    process.start()
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
    code = 1
    try:
        with os.fdopen(2, "w", closefd=False) as sys.stderr, open(os.devnull, "w") as sys.stdout:
            try:
                code = work(*arguments) or 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)
