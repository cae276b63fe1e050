"""The learning-rate schedule of a configuration, and the length of its run in steps."""

from collections.abc import Callable
from functools import partial

from dmjd.config.pretrain import PretrainConfig
from dmjd.config.schedules import COSINE, DEFAULT_COOLDOWN, DEFAULT_WARMUP_STEPS, check_warmup_ends, steps_of_epochs
from dmjd.engine.cooldown import Cooldown
from dmjd.engine.loop import Report
from dmjd.engine.optim import warmup_cosine

FIRST_EVALUATION = 100  # step of the first evaluation with a schedule whose length is open


def num_steps(config: PretrainConfig, num_images: int, batch_size: int) -> int | None:
    """The length of a run in steps; None if it is given in minutes.

    Args:
        config: its configuration.
        num_images: how many it trains on.
        batch_size: images per step.
    """
    return config.steps if config.epochs is None else steps_of_epochs(config.epochs, num_images, batch_size)


def schedule_of(config: PretrainConfig, steps: int | None) -> tuple[Callable[[float], float], int]:
    """The schedule, a function of progress, and the number of warm-up steps besides it, of a run of ``steps`` steps."""
    if config.schedule == COSINE:
        return partial(warmup_cosine, warmup=config.warmup), 0
    cooldown = DEFAULT_COOLDOWN if config.cooldown is None else config.cooldown
    warmup_steps = DEFAULT_WARMUP_STEPS if config.warmup_steps is None else config.warmup_steps
    return Cooldown(cooldown if steps is None else max(cooldown, 1 / steps)), warmup_steps  # one step at least


def check_schedule_fits(config: PretrainConfig, steps: int | None) -> None:
    """Check that the warm-up of a run of ``steps`` steps ends before its cooldown; ValueError if not."""
    schedule, warmup_steps = schedule_of(config, steps)
    if isinstance(schedule, Cooldown) and steps is not None:
        check_warmup_ends(warmup_steps, schedule.fraction, steps)


def short_warmup(config: PretrainConfig, report: Report) -> str | None:
    """What to say after the last step before a cooldown that begins within the warm-up; None otherwise.

    Of a run in minutes that is not known before: :func:`check_schedule_fits` checks the others at the start.
    """
    schedule, warmup_steps = schedule_of(config, config.steps)
    step = report.state.step
    if step >= warmup_steps or not isinstance(schedule, Cooldown):
        return None
    if schedule.has_begun(report.before) or not schedule.has_begun(report.progress):
        return None
    return (
        f"the cooldown begins after step {step}, within the warm-up of {warmup_steps} steps (--warmup-steps): the "
        f"learning rate reaches about {100 * step / warmup_steps:.2g} % of its peak. Prolong the run with more "
        f"--minutes, or start again, in another --out, with --warmup-steps {max(1, step // 10)}"
    )


def is_evaluation_step(step: int) -> bool:
    """Whether an evaluation is due at a step of a run whose length is open: each time it has grown by a quarter."""
    due = FIRST_EVALUATION
    while due < step:
        due += due // 4
    return due == step
