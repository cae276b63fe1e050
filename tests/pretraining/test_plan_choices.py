"""Plans: what is chosen and why, and what is warned of."""

import pytest

from dmjd.config.plan import PlanConfig
from dmjd.config.recipes import get_recipe
from dmjd.data.overview import Overview
from dmjd.pretraining.plan_choices import (
    GOOD_STEPS,
    HIGH_EPOCHS,
    MUCH_SHORTER,
    SMALLEST_BATCH,
    choose_batch,
    choose_model,
    choose_start,
    choose_views,
    data_warnings,
    length_warnings,
    more_views,
    time_warnings,
)


def seen(num_images=2640, side=300, **changes):
    size = (side, side)
    fields = {"gray": 0.0, "unreadable": 0.0, "neighbors_alike": 0.0, "sampled": 256} | changes
    return Overview(num_images=num_images, smallest=size, typical=size, largest=size, **fields)


def chosen(images, view, asked=None):
    """The choices if ``images`` of 128 x 128 can be trained on with a tiny encoder, others by their arithmetic."""
    asked = asked or PlanConfig(data="x", hours=1)
    cost = {"vit_base_patch16": 16.0, "vit_small_patch16": 4.0}

    def reach(encoder, size):
        return images / cost.get(encoder, 1.0) / (size[0] * size[-1] / 128**2)

    choices = choose_start(asked)
    choose_model(choices, asked, view, reach)
    choose_batch(choices, asked, view, images, cpu=True)
    return choices


@pytest.mark.parametrize(
    ("images", "view", "expected"),
    [
        (30_000, seen(), ("vit_tiny_patch16", 128, 32)),
        (2640 * HIGH_EPOCHS * 4, seen(), ("vit_tiny_patch16", 224, 64)),
        (5_000_000, seen(50_000, 32), ("vit_tiny_patch4", 32, 64)),
        (5_000_000, seen(50_000, 70), ("vit_tiny_patch4", 64, 64)),
        (200_000_000, seen(40_000), ("vit_small_patch16", 224, 64)),
        (1e10, seen(1_300_000), ("vit_base_patch16", 224, 64)),
        (1_000, seen(), ("vit_tiny_patch16", 128, SMALLEST_BATCH)),
    ],
)
def test_choices(images, view, expected):
    choices = chosen(images, view)
    size, settings = expected[2], choices.settings
    assert (settings["encoder"], settings["img_size"], settings["batch_size"]) == (expected[0], (expected[1],), size)
    assert set(choices.reasons) >= {"recipe", "encoder", "img_size", "batch_size"}


def test_the_batch_is_halved_until_there_are_enough_steps():
    for images in (1_000, 10_000, 30_000, 1_000_000):
        size = chosen(images, seen()).settings["batch_size"]
        assert images / size >= GOOD_STEPS or size == SMALLEST_BATCH
        assert size == 64 or images / (2 * size) < GOOD_STEPS


def test_what_is_given_stays_and_decides_the_recipe():
    asked = PlanConfig(data="x", hours=1, encoder="conv_vit_tiny_patch16", img_size=96, batch_size=10)
    choices = chosen(30_000, seen(), asked)
    assert choices.settings == {"encoder": "conv_vit_tiny_patch16", "img_size": (96,)}
    config = choices.config(asked)
    assert (config.encoder, config.img_size, config.batch_size) == ("conv_vit_tiny_patch16", (96,), 10)
    wide = PlanConfig(data="x", hours=1, img_size=(64, 256))
    assert chosen(30_000, seen(), wide).settings["encoder"] == "vit_tiny_patch16"
    weights = PlanConfig(data="x", init="weights", img_size=96)
    assert choose_start(weights).config(weights).img_size == (96,)
    assert choose_start(PlanConfig(data="x", teacher="resnet18")).recipe == "distill"
    assert choose_start(PlanConfig(data="x", init="weights")).recipe == "adapt"
    with pytest.raises(ValueError, match="not both"):
        PlanConfig(data="x", init="a", teacher="b")


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("images", [1_000, 1e9])
def test_the_batch_of_a_recipe_stays(images, cpu):
    """Its learning rate is for it: another batch would change that in proportion."""
    asked = PlanConfig(data="x", hours=0.1, init="weights")
    choices = choose_start(asked)
    choose_batch(choices, asked, seen(), images, cpu)
    assert choices.config(asked).batch_size == get_recipe("adapt")(init="weights").batch_size == 64
    assert choices.reasons["batch_size"].startswith("64: that of the recipe adapt")


def test_more_views_of_fewer_images_are_tried_unless_the_batch_is_decided():
    asked = PlanConfig(data="x", hours=1)
    choices = chosen(5_000_000, seen(50_000, 32))
    settings = more_views(choices, asked, 64)
    assert settings == {"num_views": 4, "batch_size": 32}
    assert more_views(choices, asked, 2 * SMALLEST_BATCH - 1) == {}
    given = PlanConfig(data="x", hours=1, batch_size=64)
    assert more_views(chosen(5_000_000, seen(), given), given, 64) == {}
    weights = PlanConfig(data="x", hours=1, init="run")  # the recipe adapt has a batch of its own
    assert more_views(choose_start(weights), weights, 64) == {}
    choose_views(choices, settings, MUCH_SHORTER + 0.01)
    assert (choices.config(asked).num_views, choices.config(asked).batch_size) == (2, 64)
    choose_views(choices, settings, MUCH_SHORTER)
    assert (choices.config(asked).num_views, choices.config(asked).batch_size) == (4, 32)


def warned(images, view, **given):
    asked = PlanConfig(data="x", hours=1, **given)
    return length_warnings(chosen(images, view, asked), asked, view, images)


def test_warnings():
    assert "only about 12 steps fit" in warned(100, seen())[0]
    assert "100 images teach a new encoder little" in warned(30_000, seen(100))[0]
    assert "a step takes 2640 images" in warned(1e9, seen(), batch_size=5000)[0]
    assert not data_warnings(seen())
    text = " ".join(data_warnings(seen(gray=1.0, unreadable=0.1, neighbors_alike=0.5)))
    for part in ("50% of the images nearly equal the next one", "10% of 256 sampled", "--in-chans 1"):
        assert part in text


def test_a_run_that_takes_longer_than_asked_is_a_warning():
    asked = PlanConfig(data="x", hours=0.1)
    times = {"minutes": 7.0, "training_minutes": 5.0, "reading_minutes": 1.0}
    (text,) = time_warnings(times, asked)
    assert text.startswith("it takes about 7.0 minutes, not 6.0: 2.0 of them go to start, reading the images,")
    assert "reading" not in time_warnings(times | {"reading_minutes": 0.0}, asked)[0]
    assert not time_warnings(times | {"minutes": 6.2}, asked)
