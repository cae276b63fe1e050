"""Messages of a run: one live line on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dmjd.streams import UnfailingStream
from dmjd.text import printable

PLAIN_SECONDS = 30.0  # between progress lines if stderr is not a terminal

LIVE_SECONDS = 2.0  # between updates of the live line on a terminal

_LONG_WAIT = 0.1  # fraction of the time spent waiting for data that is worth showing

_STALE_SECONDS = 5  # a live line that is older shows its age, so that a long step does not look like a hanging one

T = TypeVar("T")

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}


def duration_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(max(seconds, 0))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def literal(text: object) -> Text:
    """A name as part of a table: shown as it is, without markup, emoji codes or control characters."""
    return Text(printable(text))


def tracked(
    items: Iterable[T], what: str, total: int, count: Callable[[T], int] = lambda item: 1, unit: str = "images"
) -> Iterator[T]:
    """The items of an iterable; if they take over two seconds, with a line on stderr: progress, speed and time left.

    Args:
        items: e.g. the batches of a loader.
        what: what is done with them, in a few words.
        total: the sum of all counts.
        count: what an item counts.
        unit: what is counted.
    """
    console, started, done = Console(), time.monotonic(), 0
    with closing(console):
        for item in items:
            if not done:  # not before: a loader forks its processes, which is done without threads
                console.wait(f"{what} ...", after=LIVE_SECONDS)
            yield item
            done = min(total, done + count(item))
            seconds = time.monotonic() - started
            if done and seconds > LIVE_SECONDS:
                left = duration_text(seconds / done * (total - done))
                text = f"left {left}  {what}: {done} of {total} {unit}  {done / seconds:.0f} {unit}/s"
                console.line(text, done / total)


class Console:
    """Messages on stderr, tables on stdout. Names in them are shown as they are: nothing is read as markup.

    What cannot be printed is dropped: it never ends a run.

    Args:
        enabled: whether this process prints.
    """

    def __init__(self, enabled: bool = True) -> None:
        err, out = UnfailingStream(lambda: sys.stderr), UnfailingStream(lambda: sys.stdout)
        self._err = RichConsole(file=err, quiet=not enabled, **_PLAIN)  # type: ignore[arg-type]
        self._out = RichConsole(file=out, quiet=not enabled, **_PLAIN)  # type: ignore[arg-type]
        self._live: Live | None = None
        self._next_plain = 0.0
        self._line, self._updated, self._shown_from = "", 0.0, 0.0

    def say(self, text: str) -> None:
        """Print a message."""
        self._err.print(printable(text, keep="\n"))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._err.print(Text("warning: ", style="yellow") + Text(printable(text, keep="\n")))

    def table(self, table: Table, *below: str) -> None:
        """Print a table to stdout, and lines below it."""
        self._out.print(table)
        for line in below:
            self._out.print(printable(line))

    def progress(self, progress: float, step: int, epoch: float, seconds: float, scalars: dict[str, Any]) -> None:
        """Update the live line of a training.

        Args:
            progress: 0 to 1.
            step: optimizer steps done.
            epoch: epochs done.
            seconds: training time so far.
            scalars: must hold "loss", "images_per_s" and "data_wait".
        """
        left = seconds / progress * (1 - progress) if progress > 0 else 0.0
        wait = f"  data wait {100 * scalars['data_wait']:.0f} %" if scalars["data_wait"] >= _LONG_WAIT else ""
        self.line(
            f"left {duration_text(left)}  step {step}  epoch {epoch:.1f}  loss {scalars['loss']:.4f}  "
            f"{scalars['images_per_s']:.0f} images/s{wait}",
            progress,
        )

    def line(self, text: str, progress: float) -> None:
        """Update the live line: progress (0 to 1) in percent, then a text. Elsewhere than on a terminal, print the line
        if the last one is half a minute old, or the last one of all.
        """
        self._line, self._updated = f"{100 * progress:5.1f} %  {printable(text)}", time.monotonic()
        if self._err.is_terminal:
            self._start_live()
        elif time.monotonic() >= self._next_plain or progress >= 1.0:
            self._next_plain = time.monotonic() + PLAIN_SECONDS
            self._err.print(self._line)

    def wait(self, text: str, after: float = 0.0) -> None:
        """Show on a terminal what is waited for, until the next line; nothing during the first ``after`` seconds."""
        if self._err.is_terminal:
            self._line, self._updated = printable(text), time.monotonic()
            self._shown_from = self._updated + after
            self._start_live()

    def _start_live(self) -> None:
        if self._live is None:
            live = Live(console=self._err, refresh_per_second=4, transient=True, get_renderable=self._live_text)
            live.start()
            self._live = live

    def _live_text(self) -> Text:
        """The live line, cut to the width of the terminal."""
        if time.monotonic() < self._shown_from:
            return Text()
        seconds = int(time.monotonic() - self._updated)
        age = f"  ({seconds} s ago)" if seconds >= _STALE_SECONDS else ""
        text = Text(self._line, no_wrap=True)
        text.truncate(max(1, self._err.width - len(age)), overflow="ellipsis")
        return text + Text(age)

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
