"""Advice for runs that are too short to learn anything."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TINY_FIELDS

import dmjd
from dmjd.config import recipes
from dmjd.engine.loop import Report, TrainState
from dmjd.pretraining import pace
from dmjd.pretraining.pace import FEW_STEPS, SMALLEST_BATCH, Pace, few_steps, few_steps_of_epochs, hardly_trained


@given(st.floats(0.001, 1000), st.floats(0.1, 1000), st.integers(1, 4096), st.sampled_from([1, 2, 3, 8]))
def test_a_suggested_batch_is_smaller_and_gives_enough_steps(seconds, minutes, batch_size, parts):
    text = few_steps(seconds, minutes, batch_size, parts)
    if 60 * minutes / seconds >= FEW_STEPS + 1:
        assert text is None
    elif 60 * minutes / seconds < FEW_STEPS - 1:
        found = re.search(r"--batch-size (\d+), which gives about (\d+) steps", text)
        assert (found is None) == ("--minutes" in text)
        if found is not None:
            suggested, steps = map(int, found.groups())
            assert suggested < batch_size
            assert suggested % parts == 0
            assert steps >= FEW_STEPS
            assert suggested >= min(SMALLEST_BATCH, SMALLEST_BATCH // parts * parts)


def test_the_words_of_the_advice():
    assert few_steps(30.0, 2, 256) == (
        "about 4 step(s) of 256 images fit into 2 minutes, too few to train: start again, in another --out, with "
        "--batch-size 8, which gives about 128 steps"
    )
    assert few_steps(30.0, 1, 32) == (
        "about 2 step(s) of 32 images fit into 1 minute, too few to train: the model or the images are too large for "
        "that time on this machine. Give it --minutes 150, a smaller --img-size or a smaller --encoder"
    )
    assert few_steps_of_epochs(3.0, 6) == "3 epochs are only 6 step(s): use more --epochs, or a smaller --batch-size"
    assert few_steps_of_epochs(None, 6) is few_steps_of_epochs(3.0, 600) is None


@pytest.mark.parametrize(
    ("steps", "epochs", "little"),
    [(4, 0.4, True), (99, 50.0, True), (100, 1.0, False), (900, 0.4, True), (1000, 0.1, False)],
)
def test_a_run_that_saw_little_is_named(steps, epochs, little):
    assert (hardly_trained(steps, epochs) is not None) == little
    assert not little or f"{epochs:.1f} epochs, {steps} steps: hardly trained" in hardly_trained(steps, epochs)


def advice_of(monkeypatch, speed: Pace, seconds: list[float], minutes: float, spent: float = 0.0) -> list[str | None]:
    """Advice after each step, for steps that end at given seconds; each is shown."""
    clock = iter(seconds)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    reports = [
        Report(TrainState(i + 1, 0, s), min(1.0, s / 60 / minutes), None, live={}) for i, s in enumerate(seconds)
    ]
    return [speed.advice(report, spent if report.state.step > 1 else 0.0) for report in reports]


def test_advice_is_given_once_and_as_early_as_the_speed_is_known(monkeypatch):
    # The first step alone takes a tenth of the run.
    first, second = advice_of(monkeypatch, Pace(2, 256), [30.0, 60.0], 2)
    assert first.startswith("about 4 step(s)")
    assert second is None
    # A compiled model compiles in its first step.
    assert advice_of(monkeypatch, Pace(2, 256, compiled=True), [30.0, 30.5, 31.0, 36.0], 2) == [None] * 4
    # The start is not taken for the speed, and neither are evaluations.
    assert advice_of(monkeypatch, Pace(10, 64), [9.0, 12.0, 15.0, 24.1], 10, spent=10.0) == [None] * 4
    slow = advice_of(monkeypatch, Pace(60, 64), [40.0, 80.0, 120.0], 60)
    assert slow[0] is None
    assert slow[1].startswith("about 90 step(s) of 64")
    # Steps that are not shown are not looked at.
    speed = Pace(2, 256)
    assert speed.advice(Report(TrainState(1, 0, 30.0), 0.25, None), 0.0) is None


def test_a_real_run_of_few_steps_is_told_so(image_folder, tmp_path, capsys):
    fields = TINY_FIELDS | {"num_workers": 0, "batch_size": 16, "minutes": 0.002, "log_every": 20}
    result = dmjd.pretrain(recipes.dmjd(image_folder, str(tmp_path / "minutes"), **fields))
    printed = capsys.readouterr().err
    assert result.step < FEW_STEPS
    assert re.search(r"warning: about \d+ step\(s\) of 16 images fit into 0.002 minutes, too few to train", printed)
    assert re.search(rf"warning: \d+\.\d epochs, {result.step} steps?: hardly trained", printed)
    dmjd.pretrain(recipes.dmjd(image_folder, str(tmp_path / "epochs"), **fields | {"epochs": 1.0, "minutes": None}))
    assert "warning: 1 epochs are only 2 step(s)" in capsys.readouterr().err
