"""Standard streams that do not fail: a closed pipe or terminal, or a full disk under a log, ends no command."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class UnfailingStream:
    """A text stream that drops what cannot be written, and escapes characters that it cannot encode.

    Args:
        target: returns the stream to write to, or None if there is none.

    Attributes:
        error: the last error of writing.
    """

    def __init__(self, target: Callable[[], TextIO | None]) -> None:
        self._target = target
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        if (stream := self._target()) is not None:
            with self._noting_errors():
                try:
                    stream.write(text)
                except UnicodeEncodeError:
                    stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        if (stream := self._target()) is not None:
            with self._noting_errors():
                stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        try:
            stream = self._target()
            return stream is not None and stream.isatty()
        except (OSError, ValueError):
            return False

    def give_up(self) -> None:
        """Flush a last time; if that fails, send the rest nowhere, or Python would report it when it exits."""
        self.error = None
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
        except ValueError as error:  # the stream was closed
            self.error = OSError(errno.EBADF, str(error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target(), name)


@contextlib.contextmanager
def unfailing_standard_streams() -> Iterator[tuple[UnfailingStream, UnfailingStream]]:
    """Context in which ``sys.stdout`` and ``sys.stderr`` do not fail, for all libraries; yields the two."""
    for descriptor in (0, 1, 2):  # if one is closed, the next file to be opened would take its place and its output
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    stdout, stderr = sys.stdout, sys.stderr
    out, err = UnfailingStream(lambda: stdout), UnfailingStream(lambda: stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = stdout, stderr
