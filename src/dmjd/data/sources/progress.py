"""Lines of progress on stderr, for work on a set that happens once and may take long."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from dmjd.files import locked
from dmjd.streams import UnfailingStream

_PATIENCE = 5.0  # seconds of a silent wait for another process

_FIRST_SECONDS, _NEXT_SECONDS = 2.0, 10.0  # until the first line, and between two of them

T = TypeVar("T")


def counted(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items of an iterable, with lines such as "indexing shards, once: 3 of 100, 60 s left"."""
    started = time.monotonic()
    shown = started + _FIRST_SECONDS - _NEXT_SECONDS
    for done, item in enumerate(items, 1):
        now = time.monotonic()
        if now - shown >= _NEXT_SECONDS and done < total:
            shown, left = now, (now - started) / done * (total - done)
            _say(f"{what}: {done} of {total}, {left:.0f} s left")
        yield item


@contextlib.contextmanager
def locked_aloud(path: Path, what: str) -> Iterator[None]:
    """:func:`~dmjd.files.locked`, with a line such as "waiting for another process: indexing shards" after a while."""
    notice = threading.Timer(_PATIENCE, _say, [f"waiting for another process: {what}"])
    notice.daemon = True
    notice.start()
    try:
        with locked(path):
            notice.cancel()
            yield
    finally:
        notice.cancel()


def _say(line: str) -> None:
    UnfailingStream(lambda: sys.stderr).write(f"{line}\n")
