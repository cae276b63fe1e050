"""Suggestions for misspelled names in error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The middle of a message: "; did you mean 'x'?" with the most similar word, or "." if none is similar."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "."
