"""The signal that asks a run under way for a finished encoder. Imports no torch."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNAL: int | None = getattr(signal, "SIGUSR1", None)  # None: the system has none, as Windows


class CooldownSignal:
    """Context in which SIGUSR1 is noted instead of ending the process.

    In a context inside another one, the inner one notes it.
    """

    def __init__(self) -> None:
        self._noted = False
        self._previous: Any = None

    def __enter__(self) -> "CooldownSignal":
        if SIGNAL is not None and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(SIGNAL, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if SIGNAL is not None and self._previous is not None:
            signal.signal(SIGNAL, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def take(self) -> bool:
        """Whether the signal came since the last call."""
        noted, self._noted = self._noted, False
        return noted
