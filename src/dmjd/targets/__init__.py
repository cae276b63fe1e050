"""Learning targets: one vector per token of the unmasked image."""

from dmjd.targets.base import Target, whiten
from dmjd.targets.ema import EmaTarget
from dmjd.targets.hog import HogTarget, hog
from dmjd.targets.pixel import PixelTarget
from dmjd.targets.registry import TARGETS, create_target
from dmjd.targets.teacher import TeacherTarget

__all__ = [
    "TARGETS",
    "EmaTarget",
    "HogTarget",
    "PixelTarget",
    "Target",
    "TeacherTarget",
    "create_target",
    "hog",
    "whiten",
]
