"""The settings of learning-rate schedules, how they depend on each other, and epochs in steps. Imports no torch."""

import math
from fractions import Fraction
from typing import Any

from dmjd.config.fields import option

COSINE, WSD = "cosine", "wsd"

SCHEDULES = (COSINE, WSD)

DEFAULT_WARMUP = 0.05  # of a cosine: fraction of the run

DEFAULT_COOLDOWN, DEFAULT_WARMUP_STEPS = 0.2, 200  # of wsd: fraction of the run, and steps


def schedule_option(group: str) -> Any:
    """How the learning rate changes."""
    return option(
        COSINE,
        "learning rate after the warm-up: cosine; or wsd, constant with a cooldown at the end: it can be prolonged",
        group,
        choices=SCHEDULES,
    )


def check_schedule(
    schedule: str, warmup: float, warmup_steps: int | None, cooldown: float | None, init_freeze: float
) -> None:
    """Check the settings of a schedule.

    With wsd nothing before the cooldown may depend on the length of the run: otherwise a run that is prolonged would
    differ from one that was meant to be longer.

    Raises:
        ValueError: for settings of the other schedule, or that are fractions of the run with wsd.
    """
    if schedule == COSINE:
        if cooldown is not None or warmup_steps is not None:
            name = "warmup_steps" if cooldown is None else "cooldown"
            raise ValueError(f"{name} is for --schedule {WSD}; a cosine has --warmup, a fraction of the run")
        return
    if warmup != DEFAULT_WARMUP:
        raise ValueError(
            f"warmup is a fraction of the run, whose length --schedule {WSD} leaves open: give --warmup-steps instead"
        )
    if init_freeze:
        raise ValueError(
            f"init_freeze is a fraction of the run, whose length --schedule {WSD} leaves open: give --init-freeze 0, "
            "and --warmup-steps"
        )


def steps_of_epochs(epochs: float, num_images: int, batch_size: int) -> int:
    """How many steps a number of epochs takes, rounded up.

    Computed with the decimal that was given: in floats 1.1 * 100 / 10 is more than 11, and would take a step more.
    """
    return math.ceil(Fraction(str(epochs)) * num_images / batch_size)


def check_warmup_ends(warmup_steps: int, cooldown: float, steps: int) -> None:
    """Check that the warm-up of a run with wsd ends before its cooldown begins.

    Raises:
        ValueError: saying what would be short enough.
    """
    begin = math.ceil((1 - cooldown) * steps - 1e-9)
    if warmup_steps > begin:
        raise ValueError(
            f"the warm-up takes {warmup_steps} steps (--warmup-steps), but the cooldown of a run of {steps} steps "
            f"begins at step {begin}: give --warmup-steps {max(begin // 10, min(1, begin))}, or a longer run"
        )
