"""Evaluation of a trained encoder and of a randomly initialized one. Names are imported when first used."""

import importlib
from typing import Any

_MODULES = {
    "Features": "frozen.features",
    "OnlineKnn": "frozen.online_knn",
    "Stopped": "supervised.trainer",
    "evaluate": "run",
    "evaluate_all": "frozen.protocol",
    "evaluate_frozen": "frozen.protocol",
    "extract": "frozen.features",
    "extract_all": "frozen.features",
    "finetune": "supervised.finetune",
    "knn": "frozen.knn",
    "knn_whitened": "frozen.knn_whitened",
    "linear_probe": "frozen.linear",
    "linear_sweep": "frozen.linear_sweep",
    "probe_schedule": "frozen.linear",
    "read_result": "results",
    "results_table": "tables",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
