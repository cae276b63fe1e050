"""Sources of images and the loaders that read them. Names are imported when first used."""

import importlib
from typing import Any

_HOMES = {
    "Batch": "train_loader",
    "EvalLoader": "eval_loader",
    "Source": "sources.base",
    "TrainLoader": "train_loader",
    "UnreadableImages": "unreadable",
    "absolute": "sources.registry",
    "align_labels": "sources.registry",
    "has_split": "sources.registry",
    "measure_stats": "statistics",
    "open_source": "sources.registry",
    "read_all": "eval_loader",
    "typical_size": "statistics",
}
_FORMER = {"BadPictures": "UnreadableImages"}  # of version 0.1
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _FORMER:
        raise AttributeError(f"{__name__}.{name} is now {__name__}.{_FORMER[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
