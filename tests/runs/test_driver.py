"""Whatever ends a training, its last complete step is saved, and the resumed one equals an uninterrupted one."""

import os
import signal
import threading
import time
from contextlib import closing

import pytest
import torch
from support import metrics

from dmjd.engine.console import Console
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Duration, Engine, NonFiniteLoss, Task
from dmjd.engine.optim import adamw, parameter_groups
from dmjd.runs import driver
from dmjd.runs.callback import Callback
from dmjd.runs.checkpoint import RunFolder, newest_checkpoint
from dmjd.runs.driver import Driver

STEPS = 6


class Toy(Task):
    """A linear loss, not finite at a given batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 3))

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * batch).square().mean()}


class Mean(Callback):
    """Keeps a moving average of the weights, and the sum of scores of evaluations at even steps."""

    def __init__(self, task: Toy) -> None:
        self.task, self.average, self.total, self.evaluated = task, task.weight.detach().clone(), 0.0, []
        self.fail_at = self.wait_at = -1

    def restore(self, checkpoint):
        self.average, self.total = checkpoint.tensors["ema"].clone(), checkpoint.state["total"]

    def after_step(self, report):
        self.average = 0.5 * self.average + 0.5 * self.task.weight.detach()

    def is_due(self, report):
        return report.state.step % 2 == 0

    def evaluate(self, report):
        self.total += (score := float(self.average.sum()))  # before the failure: it must not count twice
        if report.state.step == self.fail_at:
            raise RuntimeError("evaluation failed")
        if report.state.step == self.wait_at:
            interrupted_wait()
        self.evaluated.append(report.state.step)
        return {"score": score}

    def state(self):
        return {"total": self.total}

    def tensors(self, tensors, final):
        return tensors | {"ema": self.average}


def interrupted_wait() -> None:
    """Send SIGTERM to this process, then wait for data that never come, as from a disk that hangs."""
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    reader, _ = os.pipe()
    os.read(reader, 1)


class Training:
    """A training of the toy in a folder; ``fault(step)`` is called before the batch of each step (from 1)."""

    def __init__(self, path, fault=lambda step: None, log_every=1, console=None, **callback) -> None:
        self.console = console or Console(enabled=False)
        self.task = Toy()
        self.mean = Mean(self.task)
        vars(self.mean).update(callback)
        self.path, self.fault, self.log_every = path, fault, log_every

    def batches(self, start):
        for step in range(start + 1, 100):
            self.fault(step)
            yield torch.full((3, 3), float(step))

    def run(self, hooks=()) -> bool:
        options = {"log_every": self.log_every}
        self.engine = Engine(
            make_fabric("cpu", "fp32"),
            self.task,
            adamw(parameter_groups(self.task, 0.0)),
            Duration(STEPS),
            0.1,
            lambda _: 1.0,
            1,
            **options,
        )
        with closing(RunFolder(self.path)) as folder:
            driver = Driver(self.engine, self.task, folder, self.console, self.batches, 10, 100, self.mean, hooks)
            driver.restore(newest_checkpoint(folder, self.console, dict))
            return driver.run()


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [1, 2, 3, 4, 5, 6]), (1000.0, [1, 6])])
def test_a_run_too_short_for_its_interval_still_has_lines(tmp_path, monkeypatch, seconds, steps):
    """The first and the last step, and those between that are shown, up to twenty."""
    monkeypatch.setattr(driver, "LIVE_SECONDS", seconds)
    training = Training(tmp_path, log_every=100, is_due=lambda report: False)
    training.run()
    assert [line["step"] for line in metrics(tmp_path)] == steps
    assert training.engine.state.step == STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_long_step_is_confirmed_before_the_step_ends(tmp_path, capsys, number):
    printed = []

    def slow(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)
            until = time.monotonic() + 1.5  # less than the patience
            while "stopping after this step" not in "".join(printed) and time.monotonic() < until:
                time.sleep(0.01)
                printed.append(capsys.readouterr().err)

    training = Training(tmp_path, slow, console=Console())
    assert not training.run()
    assert training.engine.state.step == 3
    again = "; Ctrl-C again ends at once, without saving\n" if number == signal.SIGINT else "\n"
    name = "" if number == signal.SIGINT else "SIGTERM: "
    assert f"{name}stopping after this step, which is saved{again}" in "".join(printed)
    assert "stopped at step 3, checkpoint saved" in capsys.readouterr().err


def saved(path):
    return sorted(file.name for file in (path / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    training = Training(tmp_path_factory.mktemp("runs") / "straight")
    assert training.run()
    return training


def assert_equal(resumed: Training, straight: Training) -> None:
    assert torch.equal(resumed.task.weight, straight.task.weight)
    assert torch.equal(resumed.mean.average, straight.mean.average)
    assert resumed.mean.total == straight.mean.total
    assert saved(resumed.path)[0] == "final.safetensors"


def raise_at(at, error):
    def fault(step):
        if step == at:
            raise error

    return fault


@pytest.mark.parametrize("log_every", [1, 100])
def test_an_error_in_loading_data_saves_the_last_step(tmp_path, straight, log_every):
    with pytest.raises(OSError, match="gone"):
        Training(tmp_path, raise_at(5, OSError("gone")), log_every).run()
    assert saved(tmp_path) == ["step-000000004.safetensors"]
    resumed = Training(tmp_path)
    assert resumed.run()
    assert resumed.mean.evaluated == [6]
    assert_equal(resumed, straight)


@pytest.mark.parametrize("at", [4, 6])
def test_an_evaluation_that_fails_is_done_again(tmp_path, straight, at):
    with pytest.raises(RuntimeError, match="evaluation failed"):
        Training(tmp_path, fail_at=at).run()
    assert saved(tmp_path) == [f"step-{at:09d}.safetensors"]
    resumed = Training(tmp_path)
    assert resumed.run()
    assert resumed.mean.evaluated == list(range(at, 7, 2))
    assert_equal(resumed, straight)


def test_an_error_in_another_hook_of_the_last_step_leaves_a_run_that_can_be_finished(tmp_path, straight):
    def fail(report):
        if report.state.step == STEPS:
            raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        Training(tmp_path).run([fail])
    resumed = Training(tmp_path)
    assert resumed.run()
    assert_equal(resumed, straight)


@pytest.mark.parametrize("place", ["optimizer", "callback"])
def test_an_error_in_the_middle_of_an_update_saves_nothing(tmp_path, monkeypatch, place):
    training = Training(tmp_path)
    owner, name = (torch.optim.AdamW, "step") if place == "optimizer" else (Mean, "after_step")
    original = getattr(owner, name)

    def fail(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if training.engine.state.step >= 3:
            raise RuntimeError("in the middle")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        training.run()
    assert saved(tmp_path) == []


def test_a_loss_that_is_not_finite_saves_nothing(tmp_path):
    def fault(step):
        if step == 3:
            training.task.weight.data.fill_(float("nan"))

    training = Training(tmp_path, fault)
    with pytest.raises(NonFiniteLoss):
        training.run()
    assert saved(tmp_path) == []


def test_a_signal_interrupts_a_wait_for_data(tmp_path, straight):
    assert not Training(tmp_path, lambda step: interrupted_wait() if step == 4 else None).run()
    assert saved(tmp_path) == ["step-000000003.safetensors"]
    resumed = Training(tmp_path)
    assert resumed.run()
    assert_equal(resumed, straight)


def test_a_signal_interrupts_an_evaluation_which_is_done_again(tmp_path, straight):
    assert not Training(tmp_path, wait_at=4).run()
    resumed = Training(tmp_path)
    assert resumed.run()
    assert resumed.mean.evaluated == [4, 6]
    assert_equal(resumed, straight)


def test_a_signal_at_the_very_end_is_for_what_follows(tmp_path):
    def interrupt(report):
        if report.state.step == STEPS:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Training(tmp_path).run([interrupt])
    assert saved(tmp_path) == ["final.safetensors"]
