"""Extensions need one file and one line each, and a run uses them all by name."""

import importlib

import dmjd
from dmjd.cli.main import main
from dmjd.data.sources import registry as sources
from dmjd.encoders.registry import ENCODERS
from dmjd.evaluation.registry import TASKS, FrozenTask
from dmjd.masking import SAMPLERS
from dmjd.runs.build import load_model
from dmjd.targets.registry import TARGETS

FILES = {
    "toy_masks": '''
import torch

from dmjd.masking import Masks, MaskSampler


class CheckerMasks(MaskSampler):
    """Even tokens in one view, odd tokens in the other."""

    num_views, mask_ratio, pred_ratio = 2, 0.5, 1.0

    def __init__(self, block_size=None, sigma=1.0):  # a setting of every sampler, and one of its own
        self.block_size, self.sigma = block_size, sigma

    def counts(self, grid):
        N = grid[0] * grid[1]
        return N // 2, N // 2, N

    def draw(self, keys, grid):
        ids = torch.arange(grid[0] * grid[1], device=keys.device)
        visible = torch.stack([ids[::2], ids[1::2]]).unsqueeze(1).expand(-1, len(keys), -1)  # K, B, V
        return Masks.from_visible(visible, num_tokens=len(ids))
''',
    "toy_target": '''
from dataclasses import dataclass

import torch.nn.functional as F

from dmjd.targets.base import Target, TargetSettings


@dataclass(frozen=True)
class MeanColorSettings(TargetSettings):
    scale: float = 2.0


class MeanColorTarget(Target):
    """The mean color of each token."""

    name = "mean_color"
    settings_class = MeanColorSettings

    def __init__(self, encoder, settings):
        super().__init__()
        self.patch_size, self.dim, self.scale = encoder.patch_size, encoder.in_chans, settings.scale

    def forward(self, normalized, raw):
        return self.scale * F.avg_pool2d(normalized, self.patch_size).flatten(2).transpose(1, 2)  # B, N, C
''',
    "toy_encoder": '''
from typing import ClassVar

from dmjd.encoders.vit import VisionTransformer


class Wide(VisionTransformer):
    """ViT with one wide block."""

    SIZES: ClassVar = {"mini": {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 8.0}}
''',
    "toy_evaluation": '''
from dataclasses import dataclass
from typing import ClassVar

from dmjd.config.evaluation import FrozenConfig
from dmjd.config.fields import option


@dataclass(frozen=True, kw_only=True)
class MajorityConfig(FrozenConfig):
    """Settings of the evaluation."""

    task: ClassVar[str] = "majority"

    add: float = option(0.0, "added to the score", "task", ge=0)


def majority(train, test, *, seed, device, add=0.0):
    """Accuracy of always predicting the most frequent class."""
    return {"top1": add + (test.labels == train.labels.mode().values).float().mean().item()}
''',
    "toy_source": '''
import numpy as np

from dmjd.data.sources.base import Source


class StripesSource(Source):
    """Horizontal and vertical stripes."""

    names = ("stripes",)

    def __init__(self, split="train"):
        self.name, self.split, self.classes = "stripes", split, ["horizontal", "vertical"]
        self.labels = np.arange(len(self)) % 2

    @classmethod
    def from_data(cls, data, options):
        return cls(options.split)

    def __len__(self):
        return 32 if self.split == "train" else 8

    def stored(self, index):
        image = np.zeros((16, 16, 3), np.uint8)
        image[index % 3 :: 4] = 255
        return image if self.labels[index] == 0 else image.swapaxes(0, 1).copy()

    def describe(self, index):
        return f"stripes {index} ({self.split})"
''',
}


def test_one_file_and_one_line_each(tmp_path, monkeypatch, capsys):
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    toy = {name: importlib.import_module(name) for name in FILES}
    monkeypatch.setitem(SAMPLERS, "checker", toy["toy_masks"].CheckerMasks)
    monkeypatch.setitem(TARGETS, "mean_color", toy["toy_target"].MeanColorTarget)
    monkeypatch.setitem(ENCODERS, "wide", toy["toy_encoder"].Wide)
    monkeypatch.setattr(sources, "SOURCES", (toy["toy_source"].StripesSource, *sources.SOURCES))
    line = FrozenTask("majority", "toy_evaluation:MajorityConfig", "toy_evaluation:majority", "the most frequent class")
    monkeypatch.setitem(TASKS, "majority", line)

    run = tmp_path / "run"
    flags = ["--encoder", "wide_mini_patch4", "--img-size", "16", "--masks", "checker", "--target", "mean_color"]
    flags += ["--data", "stripes", "--steps", "4", "--batch-size", "8", "--eval-every", "2", "--device", "cpu"]
    assert main(["pretrain", *flags, "--num-views", "3", "--out", str(run)]) == 2
    assert "--num-views has no meaning with checker masks" in capsys.readouterr().err
    assert main(["pretrain", *flags, "--out", str(run)]) == 0
    assert type(dmjd.load_encoder(run)).__name__ == "Wide"
    assert load_model(run)[0].branch_targets["mim"].scale == 2.0
    assert (run / "figures" / "final.png").exists()
    assert (run / "evaluation" / "knn.json").exists()
    assert main(["evaluate", "majority", str(run), "--add", "1", "--device", "cpu"]) == 0
    assert "150.0" in capsys.readouterr().out
    assert main(["evaluate"]) == 0
    assert "the most frequent class" in capsys.readouterr().out
