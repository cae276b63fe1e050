"""Whether a run is long enough to learn anything: advice after its first steps, and a warning at its end."""

import math
import time

from dmjd.engine.loop import Report

FEW_STEPS = 100  # fewer hardly train an encoder

ENOUGH_STEPS = 300  # what a suggestion aims at

SMALLEST_BATCH = 8  # that is suggested

_MEASURED_SECONDS = 5.0  # after the first step, unless a tenth of the run is over before

_ENOUGH_STEPS_OF_AN_EPOCH = 1000  # so many may be less than one epoch


class Pace:
    """Measures the first steps of a run whose length is given in minutes.

    Args:
        minutes: length of the run.
        batch_size: images per step.
        parts: the batch size must be a multiple of this number.
        compiled: whether the model is compiled: its first step takes much longer than others.
    """

    def __init__(self, minutes: float, batch_size: int, parts: int = 1, compiled: bool = False) -> None:
        self._minutes, self._batch_size, self._parts, self._compiled = minutes, batch_size, parts, compiled
        self._first: tuple[int, float] | None = None  # number of the first step seen here, and when it ended
        self._done = False

    def advice(self, report: Report, other_seconds: float) -> str | None:
        """What to say after a step: once, when its speed is known and few steps fit.

        Args:
            report: of the step. Steps without scalars are not looked at: an accelerator may not have finished them.
            other_seconds: spent on evaluations since the first step.
        """
        if self._done or (report.scalars is None and report.live is None):
            return None
        step, now = report.state.step, time.monotonic() - other_seconds
        begun = report.progress >= 0.1
        if self._first is None:
            self._first = step, now
            if not (step == 1 and begun and not self._compiled):
                return None
            seconds = report.state.seconds
        else:
            seconds = (now - self._first[1]) / (step - self._first[0])
            if not begun and now - self._first[1] < _MEASURED_SECONDS:
                return None
        self._done = True
        return few_steps(seconds, self._minutes, self._batch_size, self._parts)


def few_steps(step_seconds: float, minutes: float, batch_size: int, parts: int = 1) -> str | None:
    """What to do if fewer than 100 steps fit; None if more do.

    Args:
        step_seconds: seconds of a step.
        minutes: length of the run.
        batch_size: images per step.
        parts: the batch size must be a multiple of this number.
    """
    fit = round(60 * minutes / step_seconds)
    if fit >= FEW_STEPS:
        return None
    images = 60 * minutes / step_seconds * batch_size
    unit = "minute" if minutes == 1 else "minutes"
    text = f"about {max(fit, 1)} step(s) of {batch_size} images fit into {minutes:g} {unit}, too few to train: "
    smaller = 2 ** math.floor(math.log2(max(1.0, images / ENOUGH_STEPS)))
    smaller = max(SMALLEST_BATCH, smaller) // parts * parts
    if 0 < smaller < batch_size and images / smaller >= FEW_STEPS:
        more = f"{images / smaller:.0f} steps"
        return text + f"start again, in another --out, with --batch-size {smaller}, which gives about {more}"
    longer = math.ceil(ENOUGH_STEPS * step_seconds / 60)
    return text + (
        f"the model or the images are too large for that time on this machine. Give it --minutes {longer}, a smaller "
        "--img-size or a smaller --encoder"
    )


def few_steps_of_epochs(epochs: float | None, steps: int | None) -> str | None:
    """What to say at the start if epochs were asked for, and are few steps; None otherwise."""
    if epochs is None or steps is None or steps >= FEW_STEPS:
        return None
    return f"{epochs:g} epochs are only {steps} step(s): use more --epochs, or a smaller --batch-size"


def hardly_trained(steps: int, epochs: float) -> str | None:
    """The warning at the end of a run that saw little; None for others."""
    if steps >= FEW_STEPS and (epochs >= 1 or steps >= _ENOUGH_STEPS_OF_AN_EPOCH):
        return None
    amount = f"{epochs:.1f} epochs, {steps} step{'s' * (steps != 1)}"
    return f"{amount}: hardly trained. A longer run, or a smaller --batch-size in the same time, gives it more steps"
