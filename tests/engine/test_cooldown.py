"""The constant schedule with a cooldown at the end."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmjd.engine.cooldown import Cooldown


def test_it_falls_as_one_minus_a_root():
    cooldown = Cooldown(0.2)
    assert [cooldown(progress) for progress in (0.0, 0.5, 0.8)] == [1.0, 1.0, 1.0]
    assert cooldown(0.85) == pytest.approx(0.5)
    assert cooldown(1.0) == pytest.approx(0.0, abs=1e-9)
    assert cooldown.share(0.9) == pytest.approx(0.5)


@given(st.integers(1, 10**6), st.floats(0.001, 0.999))
def test_the_first_step_of_the_cooldown_is_found_exactly_in_spite_of_rounding(steps, fraction):
    cooldown = Cooldown(fraction)
    begin = math.ceil((1 - fraction) * steps - 1e-9)
    for step in {max(0, begin - 1), begin, min(begin + 1, steps)}:
        assert cooldown.has_begun(step / steps) == (step >= begin)
        assert 0.0 <= cooldown(step / steps) <= 1.0
        if step < begin:
            assert (cooldown(step / steps), cooldown.share(step / steps)) == (1.0, 0.0)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_cooldown_that_is_given_in_steps_begins_where_it_should(before, length):
    """As the cooldown of a branch."""
    steps = before + length
    cooldown = Cooldown(length / steps)
    assert not cooldown.has_begun((before - 1) / steps)
    assert cooldown.has_begun(before / steps)
    assert cooldown(before / steps) == 1.0
