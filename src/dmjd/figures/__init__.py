"""Figures of runs, encoders and evaluations, as matplotlib ``Figure`` objects. Names are imported when first used."""

import importlib
from typing import Any

_HOMES = {
    "attention_figure": "attention",
    "curves_figure": "curves",
    "mask_figure": "reconstruction",
    "neighbors_figure": "neighbors",
    "reconstruction_figure": "reconstruction",
    "save_figure": "grid",
    "target_figure": "reconstruction",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
