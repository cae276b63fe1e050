"""The length of a run in steps, and a warm-up that its cooldown cuts short."""

import pytest
from support import TINY_FIELDS, metrics

import dmjd
from dmjd.config import recipes
from dmjd.engine.loop import Report, TrainState
from dmjd.pretraining.schedule import num_steps, short_warmup


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [
        (1.1, 100, 10, 11),  # in floats the first four are a little more
        (2.2, 50, 10, 11),
        (0.07, 10_000, 100, 7),
        (1.1, 7 * 10**8, 25, 30_800_000),
        (1.1, 101, 10, 12),
        (3, 7, 7, 3),
        (1e-9, 100, 10, 1),
    ],
)
def test_epochs_are_rounded_up_to_whole_steps_as_they_were_given(epochs, images, batch, steps):
    assert num_steps(recipes.folder("images", "run", epochs=epochs), images, batch) == steps


def test_a_run_in_minutes_tells_once_that_its_cooldown_begins_within_the_warmup(image_folder, tmp_path, capsys):
    fields = {"schedule": "wsd", "warmup_steps": 100_000, "num_workers": 0, "batch_size": 8, "minutes": 0.005}
    dmjd.pretrain(recipes.folder(image_folder, str(tmp_path / "run"), **TINY_FIELDS | fields))
    printed = capsys.readouterr().err
    assert printed.count("within the warm-up of 100000 steps (--warmup-steps)") == 1
    step = int(printed.partition("the cooldown begins after step ")[2].partition(",")[0])
    cooled = [line["step"] for line in metrics(tmp_path / "run") if line["seconds"] >= 0.8 * 60 * 0.005]
    assert cooled[0] == step


def test_a_warmup_that_ends_before_the_cooldown_is_fine():
    def told(step, before, progress, **fields):
        config = recipes.folder("images", "run", minutes=1.0, **fields)
        return short_warmup(config, Report(TrainState(step), progress, None, before))

    wsd = {"schedule": "wsd", "warmup_steps": 200}
    assert "about 25 % of its peak" in (text := told(50, 0.79, 0.81, **wsd))
    assert "--warmup-steps 5" in text
    assert told(199, 0.79, 0.8, **wsd) is not None
    assert told(200, 0.79, 0.8, **wsd) is None
    assert told(50, 0.7, 0.79, **wsd) is None  # not yet
    assert told(51, 0.81, 0.82, **wsd) is None  # already
    assert told(50, 0.79, 0.81) is None  # a cosine's warm-up is a fraction of the run
