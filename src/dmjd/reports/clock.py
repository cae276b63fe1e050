"""The time that a report may take."""

import time


class Clock:
    """Counts down from ``seconds``; None: there is no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self.limited = seconds is not None
        self._end = time.monotonic() + (seconds if seconds is not None else 0.0)

    @property
    def left(self) -> float:
        """Seconds left; infinity without a limit."""
        return self._end - time.monotonic() if self.limited else float("inf")
