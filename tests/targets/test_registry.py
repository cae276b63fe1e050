"""Targets by name, by settings, and defined by the user."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KEYS, losses_of, smooth_images, tiny_model
from torch import Tensor, nn

from dmjd import create_encoder
from dmjd.config import recipes
from dmjd.runs.build import build_model
from dmjd.targets import TARGETS, EmaSettings, HogSettings, Target, TargetSettings, create_target


def test_targets_by_name():
    assert set(TARGETS) >= {"hog", "pixel", "teacher", "ema"}
    assert all(cls.name == name for name, cls in TARGETS.items())
    encoder = create_encoder("vit_tiny_patch8", img_size=16)
    for name in ("hog", "pixel"):
        target = create_target(name, encoder)
        assert isinstance(target, Target)
        assert target.name == name
        assert not target.state_dict()
        assert target.dim == {"hog": 108, "pixel": 192}[name]
        assert create_target(target, create_encoder("vit_tiny_patch16", in_chans=1)) is target
    assert create_target("hog", encoder, cell=2).cell_size == 2
    assert create_target("hog", encoder, bins=18).dim == 216
    assert create_target(HogSettings(bins=18), encoder).dim == 216
    assert create_target(EmaSettings(layers=2), encoder).layers == 2


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("hogg", {}, r"unknown target 'hogg'; did you mean 'hog'\?"),
        ("hog", {"cel": 2}, "target 'hog' has no setting 'cel'; did you mean 'cell'. Its settings: cell, bins"),
        ("hog", {"cell": 2, "momentum": 0.9}, "target 'hog' has no setting 'momentum'"),
        ("pixel", {"cell": 2}, "target 'pixel' has no setting 'cell'; it has none"),
        (HogSettings(), {"cell": 2}, "go with the name of a target only"),
        (TargetSettings(), {}, "TargetSettings belongs to none of the targets"),
    ],
)
def test_wrong_names_and_settings(target, settings, message):
    with pytest.raises(ValueError, match=message):
        create_target(target, create_encoder("vit_tiny_patch8", img_size=16), **settings)


def test_settings_of_a_configuration_reach_their_targets():
    fields = {"img_size": 32, "encoder": "vit_tiny_patch8", "depth": 4, "num_heads": 3}
    fields |= {"hog_cell": 2, "hog_bins": 6, "hog_color": True, "ema_layers": 3, "ema_momentum": 0.5}
    fields |= {"ema_joined": False}
    model = build_model(recipes.dmjd(mim_target="hog", vis_target="ema", **fields))
    assert (model.target("mim").cell_size, model.target("mim").num_bins, model.target("mim").color) == (2, 6, True)
    vis = model.target("vis")
    assert (vis.layers, vis.momentum, vis.joined) == (3, 0.5, False)


class MeanColor(Target):
    """A target as a user would add it: the mean of each patch's channels. It counts its calls."""

    name = "mean_color"

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.dim = channels
        self.uses = 0
        self.steps: list[tuple[int, float]] = []

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        self.uses += 1
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")  # by default, a target computes in float32
        return F.avg_pool2d(normalized, 8).flatten(2).transpose(1, 2)

    def after_step(self, encoder: nn.Module, step: int, progress: float) -> None:
        self.steps.append((step, progress))


def test_a_user_defined_target_is_computed_once_for_both_branches():
    target = MeanColor()
    model = tiny_model(target=target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*smooth_images(), keys=KEYS)
    assert out["loss"].requires_grad
    assert target.uses == 1
    model.after_step(7, progress=0.5)
    assert target.steps == [(7, 0.5)]
    assert model.target("mim") is model.target("vis") is target


def test_branches_with_different_targets():
    mim, vis = MeanColor(), MeanColor()
    model = tiny_model(mim={"target": mim}, vis={"target": vis})
    model(*smooth_images(), keys=KEYS)
    model.after_step(1)
    assert (mim.uses, vis.uses, mim.steps, vis.steps) == (1, 1, [(1, 0.0)], [(1, 0.0)])


@pytest.mark.parametrize(
    ("mim", "vis", "count"),
    [
        ("hog", "hog", 1),
        (HogSettings(cell=2), HogSettings(cell=2), 1),
        (HogSettings(cell=2), HogSettings(cell=4), 2),
        ("hog", "pixel", 2),
    ],
)
def test_equal_targets_are_held_once(mim, vis, count):
    model = tiny_model(mim={"target": mim}, vis={"target": vis})
    assert len(model.branch_targets) == count
    assert losses_of(model)["loss"] > 0
