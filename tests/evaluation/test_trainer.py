"""``fit``: learning rates by group, settings that may not change, durations."""

import pytest
import torch

from dmjd.engine.loop import Task
from dmjd.evaluation.supervised.trainer import FitSettings, fit, num_steps


def test_a_group_has_its_own_learning_rate(tmp_path):
    class Two(Task):
        def __init__(self):
            super().__init__()
            self.slow, self.fast = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))

        def forward(self, batch):
            return {"loss": (self.slow + self.fast).sum()}

    task = Two()
    groups = [{"params": [p], "weight_decay": 0.0, "lr_scale": s} for p, s in ((task.slow, 0.1), (task.fast, 1.0))]
    nothing = (0 for _ in iter(int, 1))
    options = {"validate": lambda model: {"top1": 0.0}, "identity": {}, "num_images": 1}
    settings = FitSettings(steps=5, batch_size=1, lr=0.1, warmup=0, device="cpu", precision="fp32")
    fit(task, lambda start, fabric: nothing, groups, settings, tmp_path / "x", **options)
    slow, fast = (1 - float(p.detach()) for p in (task.slow, task.fast))
    assert slow == pytest.approx(0.1 * fast, rel=1e-4)
    with pytest.raises(ValueError, match="other settings"):
        fit(Two(), lambda s, f: nothing, groups, settings, tmp_path / "x", **options | {"identity": {"data": 1}})


def test_durations():
    assert num_steps(2, None, 100, 16) == 13
    assert num_steps(None, 7, 100, 16) == 7
    for wrong in ((None, None), (1, 1), (0, None), (float("nan"), None)):
        with pytest.raises(ValueError, match="epochs"):
            num_steps(*wrong, 100, 16)
