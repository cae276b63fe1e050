"""DMJD: pre-train vision encoders on your own unlabelled images by masked image modelling.

Public names are loaded when first used, so that importing the package costs little more than Python itself.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "MaskedImageModel": "dmjd.model",
    "Masks": "dmjd.masking",
    "PretrainConfig": "dmjd.config",
    "bench": "dmjd.speed",
    "compare": "dmjd.comparison",
    "create_encoder": "dmjd.encoders",
    "disjoint_masks": "dmjd.masking",
    "embed": "dmjd.embedding",
    "evaluate": "dmjd.evaluation",
    "export": "dmjd.exporting",
    "hog": "dmjd.targets",
    "load_classifier": "dmjd.evaluation",
    "load_encoder": "dmjd.encoders",
    "pretrain": "dmjd.training",
    "show": "dmjd.visualize",
}
_MODULES = ("config", "data", "encoders", "evaluation", "interop", "masking", "recipes", "targets", "visualize")
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dmjd.{name}")
    raise AttributeError(f"module 'dmjd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
