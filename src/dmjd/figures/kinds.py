"""The kinds of figures that ``dmjd show`` draws. Imports nothing slow: the command line reads the names."""

from collections.abc import Mapping
from typing import Any

from dmjd.config.checks import check_text, shown
from dmjd.suggest import did_you_mean

MODEL_KINDS = ("masks", "targets", "reconstructions")  # need the pre-training model; others the encoder

SET_KINDS = ("neighbors", "duplicates", "outliers", "clusters")  # search a set of images

KINDS = (*MODEL_KINDS, "attention", *SET_KINDS)

# Setting -> the kinds that take it. All take data, out and num_images.
TAKEN_BY = {
    "labels": SET_KINDS,
    "num_candidates": SET_KINDS,
    "query": ("neighbors",),
    "threshold": ("duplicates",),
    "num_neighbors": ("outliers",),
    "num_clusters": ("clusters",),
}


def check_kind(kind: str) -> None:
    """Raise ValueError with a suggestion if there is no such kind."""
    if check_text("kind", kind) not in KINDS:
        raise ValueError(f"cannot show {shown(kind)}{did_you_mean(kind, KINDS)} Figures: {', '.join(KINDS)}")


def check_settings(kind: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting (not None, not empty) that figures of this kind do not take."""
    for name, value in given.items():
        if name in TAKEN_BY and kind not in TAKEN_BY[name] and value not in (None, ()):
            flag = name.replace("_", "-")
            raise ValueError(f"{name} (--{flag}) is for {', '.join(TAKEN_BY[name])}, not for {kind}")
