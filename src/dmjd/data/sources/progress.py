"""Lines of progress on stderr, for work on a set that happens once and may take long."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dmjd.streams import UnfailingStream

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
            UnfailingStream(lambda: sys.stderr).write(f"{what}: {done} of {total}, {left:.0f} s left\n")
        yield item
