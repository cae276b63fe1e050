"""Published weights, exports and embeddings. Names are imported when first used."""

import importlib
from typing import Any

_HOMES = {
    "from_timm": "conversion",
    "load_official": "conversion",
    "timm_arguments": "conversion",
    "timm_call": "conversion",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
