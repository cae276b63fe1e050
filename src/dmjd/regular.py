"""Only regular files are opened: opening a FIFO waits for ever, and opening a device may act on it."""

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
