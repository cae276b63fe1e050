"""Figures of a training or an evaluation, whose failure must not cost the result."""

from collections.abc import Callable

from dmjd.engine.console import Console


def attempt_figure(save: Callable[[], object], console: Console) -> None:
    """Save a figure; if that fails, warn: neither a training nor a result depends on it."""
    try:
        save()
    except Exception as error:  # of any library that takes part in drawing
        reason = " ".join(str(error).split()) or type(error).__name__
        console.warn(f"a figure could not be made: {reason}")
