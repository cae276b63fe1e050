"""Pictures in: sources, crops and the resumable stream. Names are loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmjd.data.bad import BadPictures as BadPictures
    from dmjd.data.base import Source as Source
    from dmjd.data.evaluation import EvalLoader as EvalLoader
    from dmjd.data.evaluation import read_all as read_all
    from dmjd.data.loader import Batch as Batch
    from dmjd.data.loader import TrainLoader as TrainLoader
    from dmjd.data.sources import absolute as absolute
    from dmjd.data.sources import align_labels as align_labels
    from dmjd.data.sources import has_split as has_split
    from dmjd.data.sources import open_source as open_source
    from dmjd.data.stats import measure_stats as measure_stats
    from dmjd.data.stats import typical_size as typical_size

_HOMES = {
    "Source": "base",
    "EvalLoader": "evaluation",
    "read_all": "evaluation",
    "BadPictures": "bad",
    "Batch": "loader",
    "TrainLoader": "loader",
    "absolute": "sources",
    "align_labels": "sources",
    "has_split": "sources",
    "open_source": "sources",
    "measure_stats": "stats",
    "typical_size": "stats",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
