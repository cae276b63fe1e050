"""The kinds of figures that ``dmjd show`` draws. Imports nothing slow: the command line reads the names."""

from dmjd.config.checks import check_text, shown
from dmjd.suggest import did_you_mean

MODEL_KINDS = ("masks", "targets", "reconstructions")  # need the pre-training model; others the encoder

KINDS = (*MODEL_KINDS, "attention", "neighbors")


def check_kind(kind: str) -> None:
    """Raise ValueError with a suggestion if there is no such kind."""
    if check_text("kind", kind) not in KINDS:
        raise ValueError(f"cannot show {shown(kind)}{did_you_mean(kind, KINDS)} Figures: {', '.join(KINDS)}")
