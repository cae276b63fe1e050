"""The end of a schedule that is constant before (warmup-stable-decay, "wsd")."""

import math
from dataclasses import dataclass

_ROUNDING = 1e-9  # of progress


@dataclass(frozen=True)
class Cooldown:
    """A schedule that is 1, then falls to 0 over the last part of the run as 1 - sqrt (Hägele et al. 2024).

    It is a function of progress before a step, 0 to 1. Nothing before the cooldown depends on the length of the run.

    Args:
        fraction: the part of the run, between 0 and 1.
    """

    fraction: float

    def has_begun(self, progress: float) -> bool:
        """Whether a step that begins at ``progress`` belongs to the cooldown."""
        return progress >= 1.0 - self.fraction - _ROUNDING

    def share(self, progress: float) -> float:
        """The part of the cooldown that is over: 0 before it, 1 at the end of the run."""
        past = progress - (1.0 - self.fraction)
        return 0.0 if past <= _ROUNDING else min(1.0, past / self.fraction)

    def __call__(self, progress: float) -> float:
        """Factor on the peak learning rate."""
        return 1.0 - math.sqrt(self.share(progress))
