"""Only regular files are opened: opening a FIFO waits for ever, and opening a device may act on it."""

import contextlib
import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular(path: str | Path) -> str | None:
    """What a path is if it is neither a regular file nor a link to one, such as ``"a FIFO"``; else None.

    Raises:
        OSError: if there is nothing, or it may not be seen.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file")


def check_regular(path: Path) -> None:
    """Raise OSError, with a reason to print, if a path exists and is no regular file; call before opening it."""
    with contextlib.suppress(FileNotFoundError):
        if kind := irregular(path):
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
