"""The time that evaluations of a run may take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.1  # of the training time so far


class EvaluationBudget:
    """Keeps evaluations to a tenth of the training time so far; what does not fit is left out.

    Args:
        limited: whether there is a limit. Otherwise the time is only measured.

    Attributes:
        spent: seconds of all evaluations of this process.
        last: seconds of the last evaluation without what is done once; None before the first one.
    """

    def __init__(self, limited: bool) -> None:
        self._limited = limited
        self._once = 0.0
        self.spent = 0.0
        self.last: float | None = None

    def allows(self, trained: float, estimate: float) -> bool:
        """Whether an evaluation fits.

        Args:
            trained: seconds of training so far.
            estimate: seconds that the first evaluation may take; later ones are expected to take as long as the last.
        """
        expected = estimate if self.last is None else self.last
        return not self._limited or self.spent + expected <= SHARE * trained

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Context of an evaluation, also one that a signal interrupts."""
        started, self._once = time.monotonic(), 0.0
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.spent += seconds
            self.last = seconds - self._once

    @contextmanager
    def once(self) -> Iterator[None]:
        """Context of a part of an evaluation that later ones do not repeat."""
        started = time.monotonic()
        yield
        self._once += time.monotonic() - started
