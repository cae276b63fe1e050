"""DMJD: pre-train vision encoders on your own unlabeled images by masked image modeling.

Public names are loaded when first used, so that importing the package is fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "ComplementaryMasks": "dmjd.masking",
    "DMJDWarning": "dmjd.warning",
    "DisjointMasks": "dmjd.masking",
    "Distillation": "dmjd.branches",
    "HalfWhitening": "dmjd.whitening",
    "IndependentMasks": "dmjd.masking",
    "MaskedImageModel": "dmjd.model",
    "Masks": "dmjd.masking",
    "PretrainConfig": "dmjd.config",
    "Reconstruction": "dmjd.branches",
    "bench": "dmjd.pretraining.bench",
    "compare": "dmjd.evaluation.compare",
    "create_encoder": "dmjd.encoders",
    "disjoint_masks": "dmjd.masking",
    "embed": "dmjd.interop.embed",
    "evaluate": "dmjd.evaluation.run",
    "export": "dmjd.interop.export",
    "hog": "dmjd.targets",
    "inspect": "dmjd.figures.inspection",
    "load_classifier": "dmjd.encoders",
    "load_encoder": "dmjd.encoders",
    "plan": "dmjd.pretraining.plan",
    "pretrain": "dmjd.pretraining.run",
    "report": "dmjd.reports.report",
    "show": "dmjd.figures.show",
}
_MODULES = {
    "config": "dmjd.config",
    "data": "dmjd.data",
    "encoders": "dmjd.encoders",
    "evaluation": "dmjd.evaluation",
    "figures": "dmjd.figures",
    "interop": "dmjd.interop",
    "masking": "dmjd.masking",
    "recipes": "dmjd.config.recipes",
    "targets": "dmjd.targets",
}
_FORMER_MODULES = {"visualize": "figures"}  # names in version 0.1
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _FORMER_MODULES:
        raise AttributeError(f"module 'dmjd.{name}' is now 'dmjd.{_FORMER_MODULES[name]}'")
    raise AttributeError(f"module 'dmjd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
