"""Messages of a run: one live line on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dmjd.streams import UnfailingStream
from dmjd.text import printable

PLAIN_SECONDS = 15.0  # between progress lines if stderr is not a terminal


_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}


def duration_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(max(seconds, 0))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def literal(text: object) -> Text:
    """A name as part of a table: shown as it is, without markup, emoji codes or control characters."""
    return Text(printable(text))


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
        self._line = ""

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
        self.line(
            f"step {step}  epoch {epoch:.1f}  loss {scalars['loss']:.4f}  "
            f"{scalars['images_per_s']:.0f} images/s  data wait {100 * scalars['data_wait']:.0f} %  "
            f"left {duration_text(left)}",
            progress,
        )

    def line(self, text: str, progress: float) -> None:
        """Update the live line: progress (0 to 1) in percent, then a text."""
        self._line = f"{100 * progress:5.1f} %  {printable(text)}"
        if self._err.is_terminal:
            if self._live is None:
                self._live = Live(console=self._err, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(Text(self._line))
        elif time.monotonic() >= self._next_plain or progress >= 1.0:
            self._next_plain = time.monotonic() + PLAIN_SECONDS
            self._err.print(self._line)

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
