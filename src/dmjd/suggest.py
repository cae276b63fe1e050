"""Suggestions for misspelled names in error messages."""

import difflib
from collections.abc import Iterable

_MANY = 100  # words; among so many, one is always slightly similar


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The middle of a message: "; did you mean 'x'?" with the most similar word, or "." if none is similar."""
    words = list(words)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5 if len(words) <= _MANY else 0.65)
    return f"; did you mean '{near[0]}'?" if near else "."
