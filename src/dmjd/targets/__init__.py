"""Learning targets: one vector per token of the unmasked image."""

from dmjd.targets.base import Target, TargetSettings, whiten
from dmjd.targets.ema import EmaSettings, EmaTarget
from dmjd.targets.hog import HogSettings, HogTarget, hog
from dmjd.targets.pixel import PixelTarget
from dmjd.targets.registry import TARGETS, create_target
from dmjd.targets.teacher import TeacherSettings, TeacherTarget

__all__ = [
    "TARGETS",
    "EmaSettings",
    "EmaTarget",
    "HogSettings",
    "HogTarget",
    "PixelTarget",
    "Target",
    "TargetSettings",
    "TeacherSettings",
    "TeacherTarget",
    "create_target",
    "hog",
    "whiten",
]
