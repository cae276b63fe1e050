"""Settings in a report, and the command that makes a run again."""

import shlex

import pytest

from dmjd.cli.pretrain import run_pretrain
from dmjd.config import recipes
from dmjd.reports.settings import pretrain_command, settings_of

CONFIGS = [
    recipes.digits(out="runs/a"),
    recipes.digits(out="runs/a", steps=10, seed=-3),
    recipes.folder("my images/é", "runs/a"),
    recipes.folder("i", "runs/a", img_size=32, minutes=20, precision="bf16"),
    recipes.folder("i", "runs/a", img_size=(32, 48), encoder="vit_tiny_patch8", embed_dim=32, depth=2, num_heads=2),
    recipes.folder("i", "runs/a", img_size=32, target="ema", flip=False, clip_grad=1.0, mean=(0.1,) * 3, std=(1,) * 3),
    recipes.mae("i", "runs/a", vis=True, warmup=0.1, labels="folder"),
    recipes.distill("i", "runs/a", teacher="t", img_size=128),
    recipes.distill("i", "runs/a", teacher="t", teacher_size=(64,)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_command_gives_the_same_settings(config, monkeypatch):
    given = []
    monkeypatch.setattr("dmjd.pretraining.run.pretrain", given.append)  # instead of training
    words = shlex.split(pretrain_command(config))
    assert words[:2] == ["dmjd", "pretrain"]
    run_pretrain(words[2:])
    assert given == [config]


def test_batch_and_rate_of_the_machine_are_no_differences():
    resolved = recipes.folder("i", "runs/a", batch_size=32, blr=1.7e-2)
    assert not [setting for setting in settings_of(resolved) if setting.recipe is not None]


def test_differences_from_the_recipe():
    changed = {s.name: (s.value, s.recipe) for s in settings_of(CONFIGS[1]) if s.recipe is not None}
    assert changed == {"steps": ("10", "2500"), "seed": ("-3", "0")}
