"""Configurations: every setting is read, errors are explained, JSON round trip, changes on resume."""

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

from dmjd.config import DetectionConfig, FinetuneConfig, KnnConfig, LinearConfig, SegmentationConfig, recipes
from dmjd.config.fields import Config, option
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import resume_differences
from dmjd.encoders.registry import ENCODERS
from dmjd.evaluation.registry import TASKS, FrozenTask
from dmjd.masking import SAMPLERS
from dmjd.targets.registry import TARGETS

SOURCE = Path(__file__).parents[2] / "src" / "dmjd"


# Setting -> property of the configuration that reads it.
BY_PROPERTY = {
    "img_size": "size",
    "mim_target": "branch_targets",
    "vis_target": "branch_targets",
    "resize": "covered",
    "blr": "lr",
}


def attributes_read(folders: list[str]) -> set[str]:
    """Settings that the code reads, as ``config.name``; configurations and the command line do not count as readers."""
    files = [file for folder in folders for file in (SOURCE / folder).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    reads = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return {node.attr for node in reads if "config" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))}


def parameters(path: str) -> set[str]:
    """Names of the keyword arguments of a function."""
    module, _, name = path.partition(":")
    return set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


READERS = [folder.name for folder in SOURCE.iterdir() if folder.is_dir() and folder.name not in ("config", "cli")]


def unread(config: type[Config], readers: set[str]) -> set[str]:
    return {f.name for f in dataclasses.fields(config)} - readers - {n for n, p in BY_PROPERTY.items() if p in readers}


def test_every_setting_of_pretraining_is_read():
    """An unused setting misleads users: in the published code, --theta and --pred_ratio never reached the model."""
    readers = attributes_read(READERS)
    for sampler in SAMPLERS.values():  # fields are passed to samplers by the names of their arguments
        readers |= set(inspect.signature(sampler).parameters)
    for family in ENCODERS.values():  # and to encoders
        readers |= set(family.SETTINGS)
    for name, target in TARGETS.items():  # and to targets
        fields = dataclasses.fields(target.settings_class) if target.settings_class is not None else ()
        readers |= {f"{name}_{field.name}" for field in fields}
    assert not unread(PretrainConfig, readers)


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_of_an_evaluation_is_read(task):
    readers = attributes_read(["evaluation", "data"])
    if isinstance(TASKS[task], FrozenTask):  # its own settings are the arguments of its function
        config = TASKS[task].load_config()
        own = set(config.own({field.name: None for field in dataclasses.fields(config)}))
        assert own <= parameters(TASKS[task].run)
        readers |= own
    assert not unread(TASKS[task].load_config(), readers)


def test_an_unused_setting_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(PretrainConfig):
        grid: int = option(1, "an attribute that others have", "method")

    assert "grid" in unread(More, attributes_read(READERS))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_json_round_trip(name):
    config = recipes.get_recipe(name)(data="somewhere", out="runs/x", seed=3)
    assert PretrainConfig.from_json(config.to_json()) == config
    assert config.recipe == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must lie between 0 and 1"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"mask_ratio": -1}, "mask_ratio"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"epochs": 1, "steps": 3}, "exactly one"),
        ({"seed": 10**23}, "seed must lie between"),
        ({"seed": 10**400}, "seed must lie between"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"mim": False, "vis": False}, "both branches are off"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean has 1 values for 3 channels"),
        ({"mean": (0.5, 0.5, 0.5)}, "both mean and std"),
        ({"labels": "colum"}, "labels must be one of none, folder, column"),
        ({"batch_size": 10, "accumulate": 4}, "not divisible"),
        ({"img_size": (1, 2, 3)}, "img_size takes 1 or 2"),
        ({"crop_scale": (0.9, 0.1)}, "crop_scale must rise"),
        ({"teacher": "runs/first"}, "--teacher has no use without target 'teacher'"),
        ({"vis_target": "teacher", "vis": False, "teacher": "runs/first"}, "--teacher has no use without target"),
        ({"ema_layers": 0}, "ema_layers must be at least 1"),
        ({"ema_momentum": 1.1}, "ema_momentum must lie between 0 and 1"),
        ({"seed": "x"}, "seed must be int"),
        ({"value_range": (1.0, float("inf"))}, "value_range must lie between"),
        ({"value_range": (1.0, 1.0)}, "value_range must rise"),
        ({"mask_ration": 0.5}, "does not take mask_ration; did you mean 'mask_ratio'"),
        ({"max_bad": 3}, "the setting max_bad is now called max_unreadable"),
        ({"strategy": "fsdp", "precision": "fp16"}, "--strategy fsdp needs --precision bf16 or fp32"),
        ({"checkpoint_type": "sharded"}, "--checkpoint-type sharded needs --strategy fsdp"),
    ],
)
def test_errors_name_the_setting_and_the_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        recipes.dmjd(**changes)


def test_the_constructor_refuses_names_like_a_recipe():
    with pytest.raises(ValueError, match="the setting max_bad is now called max_unreadable"):
        PretrainConfig(max_bad=3)


def test_values_are_converted_to_their_types():
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
    assert not resume_differences(old, old.replace(labels="folder"))
    for minutes, text in ((2.5, "--minutes 2.5"), (3.0, "--minutes 3")):
        lines = resume_differences(recipes.dmjd(minutes=minutes), old)
        assert lines == [f"length: {text} -> --steps 10 (go on with {text}, or more minutes for a longer run)"]
    assert resume_differences(old, old.replace(theta=0.5, seed=1)) == ["theta: 1.0 -> 0.5", "seed: 0 -> 1"]


def test_a_run_goes_on_with_what_a_setting_stood_for():
    """Recipes change; what one left to the encoder can be given as a flag."""
    old = recipes.dmjd(encoder="vit_tiny_patch16", img_size=128)
    assert not resume_differences(old, old.replace(block_size=2, hog_cell=8))
    assert not resume_differences(old.replace(block_size=2, hog_cell=8), old)
    assert resume_differences(old, old.replace(block_size=1)) == ["block_size: None -> 1"]
    assert resume_differences(old, old.replace(hog_cell=4)) == ["hog_cell: None -> 4"]
    assert resume_differences(old.replace(img_size=112), old.replace(img_size=112, block_size=2))  # 7 tokens
    unknown = old.replace(encoder="timm/vit_pwee")
    assert resume_differences(unknown, unknown.replace(block_size=2)) == ["block_size: None -> 2"]


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        recipes.get_recipe("digit")


@pytest.mark.parametrize("config", [FinetuneConfig, SegmentationConfig, DetectionConfig, KnnConfig, LinearConfig])
def test_all_configurations_share_the_checks(config):
    assert config.from_json(config().to_json()).to_dict() == config().to_dict()
    assert config(seed=1).replace(seed=2) == config(seed=2)
    for changes, message in (
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"sed": 1}, f"'{config.task}' does not take sed; did you mean 'seed'"),
        ({"seed": True}, "seed must be int"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (KnnConfig, {"k": 0}, "k must be at least 1"),
        (KnnConfig, {"temperature": float("nan")}, "temperature must be greater than 0"),
        (LinearConfig, {"epochs": 1, "steps": 1}, "not both"),
        (LinearConfig, {"weight_decay": float("inf")}, "weight_decay must be at least 0"),
        (FinetuneConfig, {"rand_augment": 11}, "rand_augment must lie between 0 and 10"),
        (FinetuneConfig, {"layer_decay": 0}, "layer_decay must be greater than 0 and at most 1"),
        (FinetuneConfig, {"crop_scale": 0.5}, "crop_scale takes 2 numbers"),
        (FinetuneConfig, {"labels_per_class": 1, "label_fraction": 0.5}, "not both"),
        (SegmentationConfig, {"decoder": "upernets"}, "decoder must be one of upernet, linear"),
        (SegmentationConfig, {"looks": 3}, "the setting looks is now called num_evals"),
        (SegmentationConfig, {"colours": True}, "now called color_jitter"),
        (DetectionConfig, {"outlines": True}, "now called instance_masks"),
        (DetectionConfig, {"pictures": 3}, "now called num_images"),
        (DetectionConfig, {"colours": True}, "does not take colours"),  # never a setting of this task
    ],
)
def test_invalid_settings_of_evaluations(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_files_of_former_versions_are_read():
    old = json.loads(recipes.dmjd(max_unreadable=7).to_json())
    old["max_bad"] = old.pop("max_unreadable")
    assert PretrainConfig.from_json(json.dumps(old)).max_unreadable == 7
    with pytest.raises(ValueError, match="unknown settings: nonsense"):
        PretrainConfig.from_json(json.dumps(old | {"nonsense": 1}))
    with pytest.raises(ValueError, match="format"):
        PretrainConfig.from_json(json.dumps(old | {"format": 99}))


DAMAGED = [b"", b"{", b"[" * 100_000, b"[]", b"3", b"\xff", b'{"format": "1"}', b'{"format": 1, "seed": [3]}']
DAMAGED += [b'{"format": 1, "blr": 1' + b"0" * 400 + b"}"]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_configuration_is_one_error_that_names_the_file(text):
    with pytest.raises(ValueError, match=r"^runs/a/config\.json") as caught:
        PretrainConfig.from_json(text, "runs/a/config.json")
    assert "\n" not in str(caught.value)
