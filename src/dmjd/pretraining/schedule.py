"""The learning-rate schedule of a configuration, and the length of its run in steps."""

import math
from collections.abc import Callable
from functools import partial

from dmjd.config.pretrain import PretrainConfig
from dmjd.config.schedules import COSINE, DEFAULT_COOLDOWN, DEFAULT_WARMUP_STEPS, check_warmup_ends
from dmjd.engine.cooldown import Cooldown
from dmjd.engine.optim import warmup_cosine

FIRST_EVALUATION = 100  # step of the first evaluation with a schedule whose length is open


def num_steps(config: PretrainConfig, num_images: int, batch_size: int) -> int | None:
    """The length of a run in steps; None if it is given in minutes.

    Args:
        config: its configuration.
        num_images: how many it trains on.
        batch_size: images per step.
    """
    return config.steps if config.epochs is None else math.ceil(config.epochs * num_images / batch_size)


def schedule_of(config: PretrainConfig, steps: int | None) -> tuple[Callable[[float], float], int]:
    """The schedule, a function of progress, and the number of warm-up steps besides it, of a run of ``steps`` steps.

    Raises:
        ValueError: if the warm-up would reach into the cooldown.
    """
    if config.schedule == COSINE:
        return partial(warmup_cosine, warmup=config.warmup), 0
    cooldown = DEFAULT_COOLDOWN if config.cooldown is None else config.cooldown
    warmup_steps = DEFAULT_WARMUP_STEPS if config.warmup_steps is None else config.warmup_steps
    if steps is not None:
        cooldown = max(cooldown, 1 / steps)  # one step at least
        check_warmup_ends(warmup_steps, cooldown, steps)
    return Cooldown(cooldown), warmup_steps


def is_evaluation_step(step: int) -> bool:
    """Whether an evaluation is due at a step of a run whose length is open: each time it has grown by a quarter."""
    due = FIRST_EVALUATION
    while due < step:
        due += due // 4
    return due == step
