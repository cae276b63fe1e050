"""The kinds of figures that ``dmjd show`` draws. Imports nothing slow: the command line reads the names."""

import difflib

MODEL_KINDS = ("masks", "targets", "reconstructions")  # need the pre-training model; others the encoder

KINDS = (*MODEL_KINDS, "attention", "neighbors")


def check_kind(kind: str) -> None:
    """Raise ValueError with a suggestion if there is no such kind."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)
        raise ValueError(f"cannot show '{kind}'; did you mean '{near[0]}'? There are: {', '.join(KINDS)}")
