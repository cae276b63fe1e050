"""Sources of images and the loaders that read them. Names are imported when first used."""

import importlib
from typing import Any

_HOMES = {
    "Batch": "train_loader",
    "EvalLoader": "eval_loader",
    "Source": "sources.base",
    "TrainLoader": "train_loader",
    "absolute": "sources.registry",
    "align_labels": "sources.registry",
    "has_split": "sources.registry",
    "measure_stats": "statistics",
    "open_source": "sources.registry",
    "UnreadableImages": "unreadable",
    "read_all": "eval_loader",
    "typical_size": "statistics",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
