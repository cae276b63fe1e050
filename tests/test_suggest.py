"""Suggestions name a similar word, or none."""

import pytest

from dmjd.suggest import did_you_mean


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [("hogg", "; did you mean 'hog'?"), ("teachr", "; did you mean 'teacher'?"), ("foo", "."), ("", ".")],
)
def test_only_similar_words_are_suggested(word, suggestion):
    assert did_you_mean(word, ("hog", "pixel", "teacher")) == suggestion


def test_among_many_words_a_slight_similarity_is_none():
    words = [f"lowformer_{i}" for i in range(200)]
    assert did_you_mean("nowhere", words) == "."
    assert did_you_mean("lowfomer_17", words) == "; did you mean 'lowformer_17'?"
