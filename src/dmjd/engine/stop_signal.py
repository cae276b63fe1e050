"""Signals that stop a training after its step. Imports no torch."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dmjd.system import STOP_SIGNALS, interrupt_main_thread

SAME_REQUEST = 1.0  # seconds after a signal in which another one is taken for the same request


class StopNow(BaseException):
    """Raised inside :meth:`StopSignal.interruptible` if a requested stop cannot wait for the end of the step."""


class StopSignal:
    """Context in which SIGTERM, SIGINT or SIGHUP requests a stop after the current step; a second one ends the process.

    SIGHUP stays ignored if it was, as under ``nohup``. Signals within a second of the first are taken for the same
    request: a closed terminal sends SIGHUP twice, and some launchers repeat the signal of their group.

    Args:
        patience: seconds until a request interrupts what may take long: the wait for data, an evaluation.
        heard: called at once with the number of the first signal, in a thread of its own: what the signal interrupted
            may be in the middle of printing.
    """

    def __init__(self, patience: float = 2.0, heard: Callable[[int], None] | None = None) -> None:
        self.requested = 0  # number of the signal
        self._patience, self._heard = patience, heard
        self._previous: dict[int, Any] = {}
        self._interruptible = self._overdue = False
        self._since = 0.0
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context that a stop interrupts, by :class:`StopNow`, once its time to wait is over."""
        self._interruptible = True
        try:
            if self._overdue:
                raise StopNow
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = number, time.monotonic()
            self._timer = threading.Timer(self._patience, self._end_of_patience)
            self._timer.daemon = True
            self._timer.start()
            if self._heard is not None:
                threading.Thread(target=self._heard, args=(number,), daemon=True).start()
        elif self._overdue and self._timer is not None:  # sent by the timer
            self._timer = None
            if self._interruptible:
                raise StopNow
        elif time.monotonic() - self._since > SAME_REQUEST:
            self.__exit__()
            os.kill(os.getpid(), number)

    def _end_of_patience(self) -> None:
        """Wake the main thread, in the timer's thread."""
        self._overdue = True
        interrupt_main_thread(self.requested)
