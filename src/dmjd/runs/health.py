"""Warnings of an evaluation: features that collapsed, and a run that memorizes its images."""

from collections.abc import Mapping, Sequence

from dmjd.config.pretrain import PretrainConfig

COLLAPSED_RANK = 2.0  # effective rank; with fewer directions hardly anything can be told apart

RISE = 1.05  # of the held-out loss above its minimum

_LATER = 2  # evaluations in a row above it, since one may be an accident


def collapse(rank: float) -> str | None:
    """The warning of features that are nearly equal for all images, by their effective rank, or None."""
    if rank >= COLLAPSED_RANK:
        return None
    return (
        f"the features use {rank:.1f} direction(s) (effective rank): they tell hardly any images apart. Try a lower "
        "--blr, or --target hog in place of ema, in a new --out"
    )


def warnings_of(config: PretrainConfig, metrics: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The warnings after the last evaluation of a run: "collapse" and "memorizing" -> text.

    Args:
        config: of the run.
        metrics: lines of ``metrics.jsonl``, each with its step; values that are no numbers are left out.
    """
    ranks, losses = (
        [(int(line["step"]), value) for line in metrics if isinstance(value := line.get(name), int | float)]
        for name in ("effective_rank", "held_out_loss")
    )
    found = {"collapse": collapse(ranks[-1][1]) if ranks else None, "memorizing": memorizing(config, losses)}
    return {kind: text for kind, text in found.items() if text is not None}


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
