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
    assert num_steps(1.1, None, 100, 10) == 11  # in floats a little more
    for wrong in ((None, None), (1, 1), (0, None), (float("nan"), None)):
        with pytest.raises(ValueError, match="epochs"):
            num_steps(*wrong, 100, 16)


class Killed(BaseException):
    """Ends a training as a kill does: nothing is saved any more."""


def train_one(folder, scores, stop_before: int | None = None):
    """Train one weight for six steps; validation of step s gives ``scores[s]``; optionally fail before a step."""

    class One(Task):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch):
            if batch == stop_before:
                raise Killed
            return {"loss": self.weight.sum()}

    task = One()
    steps = iter(sorted(scores))
    settings = FitSettings(6, 1, 0.1, warmup=0, device="cpu", precision="fp32", num_evals=3, checkpoint_every=3)
    return fit(
        task,
        lambda start, fabric: (step for step in range(start + 1, 100)),
        [{"params": [task.weight], "weight_decay": 0.0}],
        settings,
        folder,
        validate=lambda model: {"top1": scores[next(steps)]},
        identity={},
        num_images=1,
    )


def test_the_best_weights_are_those_of_the_best_score_after_a_kill(tmp_path):
    """Step 4 is the best until the kill; repeated on a device that does not repeat bits, it is not."""
    whole = train_one(tmp_path / "whole", {2: 0.5, 4: 0.1, 6: 0.2})
    with pytest.raises(Killed):
        train_one(tmp_path / "killed", {2: 0.5, 4: 0.9, 6: 0.2}, stop_before=5)
    resumed = train_one(tmp_path / "killed", {4: 0.1, 6: 0.2})
    assert resumed.best == whole.best == {"step": 2, "top1": 0.5}
    weights = []
    for result in (whole, resumed):
        with result.best_weights() as model:
            weights.append(model.weight.item())
        files = {file.name for file in (result.folder / "checkpoints").iterdir()}
        assert files == {"final.safetensors", "best-000000002.safetensors"}
    assert weights[0] == weights[1]


def test_missing_best_weights_are_named_before_training(tmp_path):
    with pytest.raises(Killed):
        train_one(tmp_path, {2: 0.5, 4: 0.9}, stop_before=5)
    for file in (tmp_path / "checkpoints").glob("best-*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"best-000000002.safetensors is missing; delete .* to train again"):
        train_one(tmp_path, {4: 0.1, 6: 0.2})
