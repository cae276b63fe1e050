"""Learning targets: one vector per token of the unmasked image. To add one, write a file and a line in ``TARGETS``."""

import difflib
from collections.abc import Callable
from typing import Any

from dmjd.targets.base import Target, whiten
from dmjd.targets.hog import HogTarget, default_cell, hog
from dmjd.targets.pixel import PixelTarget

__all__ = ["TARGETS", "HogTarget", "PixelTarget", "Target", "create_target", "default_cell", "hog", "whiten"]

# name: maker(patch_size=, in_chans=, **options of that target)
TARGETS: dict[str, Callable[..., Target]] = {"hog": HogTarget, "pixel": PixelTarget}


def create_target(target: str | Target, *, patch_size: int, in_chans: int, **options: Any) -> Target:
    """A target by name, or a ready one passed through.

    Raises:
        ValueError: unknown name; the nearest is suggested.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown target '{target}'; did you mean '{near[0]}'? Targets: {', '.join(TARGETS)}")
    return TARGETS[target](patch_size=patch_size, in_chans=in_chans, **options)
