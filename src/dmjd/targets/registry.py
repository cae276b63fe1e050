"""Learning targets: one vector per token of the unmasked image. To add one, write a file and a line in ``TARGETS``."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dmjd.encoders.base import Encoder
from dmjd.targets.base import Target
from dmjd.targets.ema import MOMENTUM, EmaTarget
from dmjd.targets.hog import NUM_BINS, HogTarget
from dmjd.targets.pixel import PixelTarget
from dmjd.targets.teacher import TeacherTarget


def _hog(encoder: Encoder, *, hog_cell: int | None = None, hog_bins: int = NUM_BINS, **others: Any) -> Target:
    return HogTarget(patch_size=encoder.patch_size, in_chans=encoder.in_chans, cell_size=hog_cell, num_bins=hog_bins)


def _pixel(encoder: Encoder, **others: Any) -> Target:
    return PixelTarget(patch_size=encoder.patch_size, in_chans=encoder.in_chans)


def _teacher(
    encoder: Encoder, *, teacher: str | Path | nn.Module | None = None, teacher_layers: int = 1, **others: Any
) -> Target:
    return TeacherTarget(encoder, teacher, layers=teacher_layers)


def _ema(encoder: Encoder, *, ema_layers: int | None = None, ema_momentum: float = MOMENTUM, **others: Any) -> Target:
    return EmaTarget(encoder, layers=ema_layers, momentum=ema_momentum)


# name: maker(encoder, **settings of a run by the names of the configuration), which takes its own and leaves others
TARGETS: dict[str, Callable[..., Target]] = {"hog": _hog, "pixel": _pixel, "teacher": _teacher, "ema": _ema}


def create_target(target: str | Target, encoder: Encoder, **settings: Any) -> Target:
    """A target by name, or a ready one passed through.

    Args:
        target: a name of :data:`TARGETS`, or a target. encoder: the encoder that will learn from it.
        settings: ``hog_cell``, ``hog_bins``, ``teacher``, ``teacher_layers``, ``ema_layers``, ``ema_momentum``, as in
            :class:`~dmjd.config.pretrain.PretrainConfig`; those of other targets are left alone.

    Raises:
        ValueError: unknown name (the nearest is suggested), or settings that cannot be.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown target '{target}'; did you mean '{near[0]}'? Targets: {', '.join(TARGETS)}")
    return TARGETS[target](encoder, **settings)
