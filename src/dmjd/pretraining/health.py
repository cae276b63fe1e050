"""Warnings of an evaluation: features that collapsed, and a run that memorizes its images."""

from collections.abc import Mapping, Sequence

from dmjd.config.pretrain import PretrainConfig

COLLAPSED_RANK = 2.0  # effective rank; with fewer directions hardly anything can be told apart

RISE = 1.05  # of the held-out loss above its minimum

_LATER = 2  # evaluations in a row above it, since one may be an accident


def collapse(scores: Mapping[str, float]) -> str | None:
    """The warning of features that are nearly equal for all images, or None."""
    rank = scores.get("effective_rank")
    if rank is None or rank >= COLLAPSED_RANK:
        return None
    return (
        f"the features use {rank:.1f} direction(s) (effective rank): they tell hardly any images apart. Try a lower "
        "--blr, or --target hog in place of ema, in a new --out"
    )


def memorizing(config: PretrainConfig, held_out: Sequence[tuple[int, float]]) -> str | None:
    """The warning of a held-out loss that rises again, or None.

    Args:
        config: of the run. A target that follows the encoder has no comparable losses, so there is no warning.
        held_out: (step, held-out loss) of all evaluations so far, in order.
    """
    if "ema" in config.branch_targets.values() and config.ema_momentum < 1:
        return None
    step, least = min(held_out, key=lambda point: point[1], default=(0, 0.0))
    later = [loss for at, loss in held_out if at > step]
    if len(later) < _LATER or min(later[-_LATER:]) < RISE * least:
        return None
    return (
        f"the held-out loss was lowest at step {step} ({least:.4f}) and is {later[-1] / least - 1:.0%} above it: the "
        "run memorizes its images. More images, a shorter run or a higher --mask-ratio help"
    )
