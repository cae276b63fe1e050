"""What a run says while it works: one live line on a terminal, a plain line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 15.0  # between lines when nobody watches a terminal


def duration_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(max(seconds, 0))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Console:
    """Messages on stderr; tables on stdout. Silent in all processes but the first.

    Args:
        enabled: whether this process speaks.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._err = RichConsole(stderr=True, quiet=not enabled, highlight=False, soft_wrap=True)
        self._out = RichConsole(quiet=not enabled, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._next_plain = 0.0
        self._line = ""

    def say(self, text: str) -> None:
        """One line."""
        self._err.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line, marked as a warning."""
        self._err.print(Text("warning: ", style="yellow") + Text(text))

    def table(self, table: Table) -> None:
        """A result, on stdout."""
        self._out.print(table)

    def progress(self, share: float, step: int, epoch: float, seconds: float, scalars: dict[str, Any]) -> None:
        """Renew the live line: share done, loss, images/s, data wait, time left."""
        left = seconds / share * (1 - share) if share > 0 else 0.0
        self.line(
            f"step {step}  epoch {epoch:.1f}  loss {scalars['loss']:.4f}  "
            f"{scalars['images_per_s']:.0f} images/s  data wait {100 * scalars['data_wait']:.0f} %  "
            f"left {duration_text(left)}",
            share,
        )

    def line(self, text: str, share: float) -> None:
        """Renew the live line with the share done and a text."""
        self._line = f"{100 * share:5.1f} %  {text}"
        if self._err.is_terminal:
            if self._live is None:
                self._live = Live(console=self._err, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(Text(self._line))
        elif time.monotonic() >= self._next_plain or share >= 1.0:
            self._next_plain = time.monotonic() + PLAIN_SECONDS
            self._err.print(self._line, markup=False)

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
