"""Flags without effect are named."""

import pytest

from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.unused import _OF_BRANCHES, _OF_TARGETS, flags_without_effect


def lines(recipe: str, **given: object) -> list[str]:
    return list(flags_without_effect(recipes.get_recipe(recipe)(**given), given))


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ("dmjd", {"teacher_size": 64}, ["--teacher-size has no effect: the target is hog"]),
        ("dmjd", {"ema_momentum": 0.9}, ["--ema-momentum has no effect: the target is hog"]),
        ("mae", {"hog_cell": 4}, ["--hog-cell has no effect: the target is pixel"]),
        ("mae", {"vis_target": "ema"}, ["--vis-target has no effect: the branch on visible tokens (--vis) is off"]),
        ("dmjd", {"vis": False, "theta": 3.0}, ["--theta has no effect: the branch on visible tokens (--vis) is off"]),
        (
            "jd",
            {"mim": False, "decode_ratio": 0.5},
            ["--decode-ratio has no effect: the branch on masked tokens (--mim) is off"],
        ),
        ("adapt", {"target": "hog"}, ["--target has no effect beside --mim-target pixel and --vis-target ema"]),
        ("dmjd", {"target": "teacher", "teacher_size": 64, "teacher": "x"}, []),
        ("dmjd", {"mim_target": "ema", "ema_momentum": 0.9, "theta": 2.0, "hog_color": True}, []),
        ("distill", {"teacher": "x"}, []),  # settings of a recipe are not given
    ],
)
def test_flags_without_effect(recipe, given, expected):
    assert lines(recipe, **given) == expected


def test_all_of_them_are_settings():
    names = {name for group in (_OF_TARGETS, _OF_BRANCHES) for names in group.values() for name in names}
    assert names <= set(PretrainConfig.__dataclass_fields__)
    prefixes = ("hog_", "teacher_", "ema_", "mim_", "vis_", "decod", "projector_")
    shared = {"decoder_dim"}  # of decoder and projector
    assert {name for name in PretrainConfig.__dataclass_fields__ if name.startswith(prefixes)} - shared <= names


def test_the_command_names_them(tmp_path, capsys):
    arguments = ["mae", "--theta", "3", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    assert main(["pretrain", *arguments]) == 2
    assert "warning: --theta has no effect" in capsys.readouterr().err
