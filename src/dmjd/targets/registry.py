"""Targets by name. To add one, write a file with a :class:`~dmjd.targets.base.Target` and a line in ``TARGETS``."""

import dataclasses
from typing import Any

from dmjd.config.checks import shown
from dmjd.encoders.base import Encoder
from dmjd.suggest import did_you_mean
from dmjd.targets.base import Target, TargetSettings
from dmjd.targets.ema import EmaTarget
from dmjd.targets.hog import HogTarget
from dmjd.targets.pixel import PixelTarget
from dmjd.targets.teacher import TeacherTarget

TARGETS: dict[str, type[Target]] = {
    "hog": HogTarget,
    "pixel": PixelTarget,
    "teacher": TeacherTarget,
    "ema": EmaTarget,
}


def target_class(name: str) -> type[Target]:
    """The class of a target.

    Raises:
        ValueError: if the name is not in :data:`TARGETS`; the nearest is suggested.
    """
    if name not in TARGETS:
        raise ValueError(f"unknown target {shown(name)}{did_you_mean(name, TARGETS)} Targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def create_target(target: str | TargetSettings | Target, encoder: Encoder, **settings: Any) -> Target:
    """Create a target for an encoder.

    Args:
        target: a name in :data:`TARGETS`, the settings of a target (such as ``HogSettings(cell=4)``), or a target,
            which is returned unchanged.
        encoder: the encoder that will learn from it.
        settings: fields of the target's settings, if ``target`` is a name.

    Raises:
        ValueError: for an unknown name or setting (the nearest is suggested), or a value out of range.
    """
    if not isinstance(target, str) and settings:
        raise ValueError(f"settings ({', '.join(settings)}) go with the name of a target only")
    if isinstance(target, Target):
        return target
    if isinstance(target, TargetSettings):
        cls = next((c for c in TARGETS.values() if c.settings_class is type(target)), None)
        if cls is None:
            raise ValueError(f"{type(target).__name__} belongs to none of the targets: {', '.join(TARGETS)}")
        return cls(encoder, target)
    cls = target_class(target)
    known = [] if cls.settings_class is None else [f.name for f in dataclasses.fields(cls.settings_class)]
    for name in settings:
        if name not in known:
            hint = f"{did_you_mean(name, known)} Its settings: {', '.join(known)}" if known else "; it has none"
            raise ValueError(f"target '{target}' has no setting '{name}'{hint}")
    if cls.settings_class is None:
        return cls(encoder)
    return cls(encoder, cls.settings_class(**settings))
