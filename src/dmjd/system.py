"""What operating systems do in different ways: locks of open files, and signals. Imports no torch."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None  # type: ignore[assignment]

# The signals that request an end: Ctrl-C, that of a cluster, and that of a closed terminal, which Windows lacks.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

OPEN_FILES_STAY = os.name == "nt"  # a file that is open can be neither renamed nor deleted

_FAR = 1 << 30  # byte that is locked on Windows, behind any content: what is locked there cannot be read

_OLD = 24 * 3600  # seconds after which a temporary file counts as left behind, where there are no locks

_POLL = 0.1


def lock(file: IO[str] | IO[bytes] | int, wait: bool = False) -> None:
    """Lock an open file for this process, until it is closed.

    Where neither ``flock`` nor its counterpart exists, nothing is held.

    Args:
        file: open file or descriptor.
        wait: wait for the process that holds the lock.

    Raises:
        BlockingIOError: if another process holds it. OSError: on a file system without locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    elif msvcrt is not None:
        _lock_on_windows(file if isinstance(file, int) else file.fileno(), wait)


def _lock_on_windows(descriptor: int, wait: bool) -> None:
    while True:
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return
        except PermissionError:
            if not wait:
                raise BlockingIOError(f"another process holds the lock of descriptor {descriptor}") from None
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
        time.sleep(_POLL)


def is_left_behind(path: str | Path) -> bool:
    """Whether the process that wrote a temporary file is gone: the file is not locked; without locks, a day old."""
    if fcntl is None:
        return time.time() - os.stat(path).st_mtime > _OLD
    with open(path, "rb") as file:
        try:
            lock(file)
        except BlockingIOError:
            return False
    return True


def interrupt_main_thread(number: int) -> None:
    """Send a signal to the main thread, from any other: only that interrupts a system call such as a read."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def exists(pid: int) -> bool:
    """Whether a process of this machine exists, as far as that is known."""
    if os.name == "nt":  # there, a signal 0 would be a Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists and belongs to another user
        return True
    return True
