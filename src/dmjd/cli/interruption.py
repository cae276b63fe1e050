"""Signals outside of training: one line and an exit code, no traceback."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from dmjd.engine.stop_signal import SAME_REQUEST
from dmjd.system import STOP_SIGNALS, interrupt_main_thread


class Interruption:
    """Context in which SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; a second one ends the process at once.

    SIGHUP stays ignored if it was, as under ``nohup``. Signals within a second of the first are taken for the same.

    Args:
        ends_process: whether the process ends after the context. Signals that come then end it silently.

    Attributes:
        number: the signal that was raised, or 0.
    """

    def __init__(self, ends_process: bool) -> None:
        self.number = 0
        self._ends_process = ends_process
        self._ends = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as shells report it."""
        return 128 + (self.number or signal.SIGINT)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            sys.unraisablehook = self._raise_again
        return self

    def end(self) -> None:
        """From now on a signal raises nothing, because the process ends anyway; a second one still ends it at once."""
        self._ends = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # CPython remembers a KeyboardInterrupt that left the exec() of a string, such as a dataclass's, and ends the
        # process by SIGINT whatever its exit code. The next exec() of a string makes it forget.
        exec("")
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if self._ends_process else handler)
        if self._previous:
            sys.unraisablehook = self._hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._since:
            self._since = time.monotonic()
            if not self._ends:
                self.number = number
                raise KeyboardInterrupt
        elif time.monotonic() - self._since > SAME_REQUEST:
            os._exit(128 + number)

    def _raise_again(self, unraisable: Any) -> None:
        """A signal that came during a destructor or callback is lost there: send it again, a moment later."""
        if unraisable.exc_type is not KeyboardInterrupt or not self.number:
            self._hook(unraisable)
            return
        number, self.number, self._since = self.number, 0, 0.0
        timer = threading.Timer(0.05, lambda: interrupt_main_thread(number))
        timer.daemon = True
        timer.start()
