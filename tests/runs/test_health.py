"""Warnings of collapsed features and of memorized images: when they come, and when not."""

import pytest

from dmjd.config import recipes
from dmjd.runs.health import collapse, memorizing, warnings_of


def test_collapse():
    assert collapse(9.0) is None
    assert "1.2 direction(s)" in collapse(1.2)


def test_warnings_are_those_after_the_last_evaluation():
    losses = [1.0, 0.8, 0.9, 0.92]
    lines = [
        {"step": i, "held_out_loss": loss, "effective_rank": rank}
        for i, (loss, rank) in enumerate(zip(losses, (9, 9, 9, 1.1), strict=True))
    ]
    lines += [{"step": 4, "loss": 1.0}, {"step": 4, "effective_rank": "?"}]
    assert set(warnings_of(recipes.dmjd(), lines)) == {"collapse", "memorizing"}
    assert warnings_of(recipes.dmjd(), lines[:3]) == {}
    assert warnings_of(recipes.dmjd(), []) == {}


@pytest.mark.parametrize(
    ("losses", "warns"),
    [
        ([], False),
        ([1.0, 0.9, 0.8], False),
        ([1.0, 0.8, 0.9], False),  # once may be an accident
        ([1.0, 0.8, 0.9, 0.81], False),
        ([1.0, 0.8, 0.9, 0.92], True),
        ([1.0, 0.8, 0.9, 0.92, 0.79], False),
    ],
)
def test_memorizing(losses, warns):
    points = [(10 * i, loss) for i, loss in enumerate(losses)]
    text = memorizing(recipes.dmjd(), points)
    assert (text is not None) == warns
    if warns:
        assert "lowest at step 10 (0.8000) and is 15% above it" in text
    assert memorizing(recipes.dmjd(vis_target="ema"), points) is None  # its target moves
    assert (memorizing(recipes.dmjd(vis_target="ema", ema_momentum=1.0), points) is not None) == warns
