"""The configuration: every field is read, checks name the cure, JSON round trip, what may change on resume."""

import ast
import dataclasses
from pathlib import Path

import pytest

from dmjd.config import recipes
from dmjd.config.pretrain import PretrainConfig, resume_differences

SOURCE = Path(__file__).parents[2] / "src" / "dmjd"


def test_every_field_is_read_somewhere():
    """A setting nobody reads is a lie to the user (the published --theta and --pred_ratio never reached the model)."""
    read = set()
    for file in SOURCE.rglob("*.py"):
        if file.name in ("config.py", "recipes.py", "cli.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    by_property = {"img_size": "size", "resume": "resume", "recipe": "recipe"}
    fields = {f.name for f in dataclasses.fields(PretrainConfig)}
    assert {f for f in fields if by_property.get(f, f) not in read} <= {"recipe"}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_json_round_trip(name):
    config = recipes.get_recipe(name)(data="somewhere", out="runs/x", seed=3)
    assert PretrainConfig.from_json(config.to_json()) == config
    assert config.recipe == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"mask_ratio": -1}, "mask_ratio"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"epochs": 1, "steps": 3}, "exactly one"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"mim": False, "vis": False}, "both branches are off"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean has 1 values for 3 channels"),
        ({"mean": (0.5, 0.5, 0.5)}, "both mean and std"),
        ({"labels": "colum"}, "labels must be one of none, folder, column"),
        ({"batch_size": 10, "accumulate": 4}, "not divisible"),
        ({"masks": "independent", "pred_ratio": 0.9}, "pred_ratio has no meaning"),
        ({"img_size": (1, 2, 3)}, "img_size takes 1 or 2"),
        ({"crop_scale": (0.9, 0.1)}, "crop_scale must rise"),
        ({"target": "teacher"}, "--teacher and target 'teacher'"),
        ({"teacher": "runs/first"}, "--teacher and target 'teacher'"),
        ({"vis_target": "teacher", "vis": False, "teacher": "runs/first"}, "--teacher and target 'teacher'"),
        ({"ema_layers": 0}, "ema_layers must be at least 1"),
        ({"ema_momentum": 1.1}, "ema_momentum must be between 0 and 1"),
        ({"seed": "x"}, "seed must be int"),
        ({"nonsense": 1}, "unknown setting: nonsense"),
    ],
)
def test_mistakes_name_the_field_and_the_cure(changes, message):
    with pytest.raises(ValueError, match=message):
        recipes.dmjd(**changes)


def test_python_numbers_are_brought_to_type():
    config = recipes.dmjd(img_size=32, epochs=3, crop_scale=[1, 1])
    assert config.img_size == (32,)
    assert config.size == (32, 32)
    assert isinstance(config.epochs, float)
    assert config.crop_scale == (1.0, 1.0)
    assert recipes.dmjd(img_size=(48, 64)).size == (48, 64)


def test_a_new_duration_replaces_the_recipes():
    config = recipes.digits(steps=7)
    assert (config.steps, config.minutes, config.epochs) == (7, None, None)


def test_what_may_change_on_resume():
    old = recipes.dmjd(steps=10)
    assert not resume_differences(
        old, old.replace(steps=20, num_workers=3, checkpoint_every=1, device="cpu", max_unreadable=5)
    )
    assert not resume_differences(*(old.replace(target="teacher", teacher=place) for place in ("runs/a", "runs/b")))
    assert "steps" in resume_differences(old, old.replace(steps=5))[0]
    assert "epochs" in "".join(resume_differences(old, old.replace(epochs=5)))
    assert resume_differences(old, old.replace(theta=0.5, seed=1)) == ["theta: 1.0 -> 0.5", "seed: 0 -> 1"]


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        recipes.get_recipe("digit")
