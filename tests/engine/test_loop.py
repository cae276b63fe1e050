"""The training loop: non-finite steps, durations, stop signals, accumulation."""

import itertools
import os
import signal
import time

import pytest
import torch
from lightning.fabric import Fabric
from torch.overrides import TorchFunctionMode

from dmjd.engine.device import Autocast, make_fabric
from dmjd.engine.loop import Duration, Engine, NonFiniteLoss, Report, Task
from dmjd.engine.optim import adamw, parameter_groups
from dmjd.engine.stop_signal import StopSignal


class Toy(Task):
    """A linear loss that becomes NaN at a given call."""

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 3))
        self.nan_at, self.calls = nan_at, 0
        self.after: list[tuple[int, float]] = []

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"loss": (self.weight * batch).sum() * (float("nan") if self.calls == self.nan_at else 1.0)}

    def after_step(self, step: int, progress: float) -> None:
        self.after.append((step, progress))


def engine_of(task: Task, steps: int = 10, **options) -> Engine:
    fabric = make_fabric("cpu", "fp32")
    return Engine(
        fabric, task, adamw(parameter_groups(task, 0.0)), Duration(steps=steps), 0.1, lambda progress: 1.0, 1, **options
    )


def ones():
    return iter(lambda: torch.ones(3, 3), None)


@pytest.mark.parametrize("eager", [True, False], ids=["host", "device"])
def test_a_non_finite_loss_stops_before_the_step(eager):
    """On accelerators the update is skipped on the device, and the step is reported when scalars are logged."""
    task = Toy(nan_at=4)
    engine = engine_of(task, log_every=6)
    engine._eager = eager
    seen = {}

    def keep(report: Report) -> None:
        seen[report.state.step] = task.weight.detach().clone()

    with pytest.raises(NonFiniteLoss, match="at step 4"), StopSignal() as stop:
        engine.run(ones(), [keep], stop)
    assert torch.equal(task.weight, seen[3])
    assert not torch.equal(seen[2], seen[3])
    assert engine.state.step == (3 if eager else 6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_a_scaled_loss_is_the_plain_step(fused):
    task = Toy()
    fabric = Fabric(
        accelerator="cpu",
        devices=1,
        plugins=Autocast("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)),
    )
    optimizer = torch.optim.SGD(task.parameters(), lr=1.0, fused=fused)
    engine = Engine(fabric, task, optimizer, Duration(steps=2), 0.25, lambda progress: 1.0, 1)
    norms, engine.log_every = [], 1
    assert engine.run(ones(), [lambda report: norms.append(report.scalars["grad_norm"])], StopSignal())
    assert norms == [3.0, 3.0]
    assert torch.equal(task.weight, torch.full((3, 3), 0.5))


def test_hooks_and_task_see_every_step_and_scalars_at_intervals():
    task, reports = Toy(), []

    def keep(report: Report) -> None:
        reports.append((report.state.step, report.progress, report.scalars is not None))

    assert engine_of(task, steps=5, log_every=2).run(ones(), [keep], StopSignal())
    assert reports == [(1, 0.2, False), (2, 0.4, True), (3, 0.6, False), (4, 0.8, True), (5, 1.0, True)]
    assert task.after == [(step, progress) for step, progress, _ in reports]


def scalars_of(engine: Engine, **options) -> tuple[dict, dict]:
    """Scalars of logged steps and of steps that are only shown."""
    logged, live = {}, {}

    def keep(report: Report) -> None:
        for kept, scalars in ((logged, report.scalars), (live, report.live)):
            if scalars is not None:
                kept[report.state.step] = {name: scalars[name] for name in ("loss", "grad_norm", "lr")}

    assert engine.run(ones(), [keep], StopSignal(), **options)
    return logged, live


def test_what_is_shown_between_logged_steps_does_not_change_what_is_logged():
    logged, live = scalars_of(engine_of(Toy(), steps=7, log_every=3), show_every=0.0)
    alone, nothing = scalars_of(engine_of(Toy(), steps=7, log_every=3))
    assert logged == alone
    assert (list(logged), list(live)) == ([3, 6, 7], [1, 2, 4, 5])
    assert not nothing
    assert live[2]["loss"] > logged[3]["loss"]  # means since the last logged step of a falling loss


class Reads(TorchFunctionMode):
    """Counts reads of values, each of which waits for an accelerator."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        named = getattr(func, "__name__", "")
        self.count += named in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
        return func(*args, **(kwargs or {}))


def test_hooks_do_not_count_in_the_throughput():
    """As if an evaluation came after the third of six steps, a hundred times as long as these."""
    rates = []

    def evaluate(report: Report) -> None:
        if report.state.step == 3:
            time.sleep(0.5)
        if report.scalars is not None:
            rates.append(report.scalars["images_per_s"])

    with StopSignal() as stop:
        engine_of(Toy(), steps=6, log_every=6).run(ones(), [evaluate], stop)
    assert rates[0] > 6 / 0.25


def test_an_accelerator_is_waited_for_only_in_steps_that_are_shown():
    engine = engine_of(Toy(), steps=40, log_every=1000)
    engine._eager = False
    reads = {}
    with Reads() as mode:
        engine.run(ones(), [lambda report: reads.update({report.state.step: mode.count})], StopSignal(), 1000.0)
    steps = [0, *reads.values()]
    per_step = [now - before for before, now in itertools.pairwise(steps)]
    assert set(per_step[1:-1]) == {1}  # the seed of the step, a number on the host
    assert per_step[0] > 1  # shown at once
    assert per_step[-1] > 1  # logged


def test_a_step_that_is_shown_finds_a_loss_that_is_not_finite():
    engine = engine_of(Toy(nan_at=4), log_every=1000)
    engine._eager = False
    with pytest.raises(NonFiniteLoss, match="at step 4"):
        engine.run(ones(), [], StopSignal(), 0.0)
    assert engine.state.step == 4


def test_a_signal_stops_after_the_step_and_the_run_resumes():
    engine = engine_of(Toy())

    def interrupt(report: Report) -> None:
        if report.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with StopSignal() as stop:
        assert not engine.run(ones(), [interrupt], stop)
    assert engine.state.step == 4  # a signal sent after step 3 takes effect after step 4
    state = engine.state_dict()
    again = engine_of(Toy())
    again.load_state_dict(state)
    assert again.progress == 0.4
    assert again.run(ones(), [], StopSignal())
    assert again.state.step == 10


def test_accumulated_micro_batches_equal_one_batch():
    class Mean(Toy):
        def forward(self, batch):
            return {"loss": (self.weight * batch).square().mean()}

    data = torch.randn(4, 6, 3, 3)
    whole, parts = Mean(), Mean()
    engine_of(whole, steps=4).run(iter(data), [], StopSignal())
    engine_of(parts, steps=4, accumulate=2).run(iter(data.reshape(8, 3, 3, 3)), [], StopSignal())
    torch.testing.assert_close(whole.weight, parts.weight)


def test_gradients_are_clipped():
    norms = []

    def keep(report: Report) -> None:
        norms.append(report.scalars["grad_norm"])

    engine = engine_of(Toy(), steps=1, clip_grad=0.5)
    stepped = []
    engine.optimizer.register_step_pre_hook(lambda optimizer, *_: stepped.append(engine.task.weight.grad.norm().item()))
    engine.run(ones(), [keep], StopSignal())
    assert norms == [pytest.approx(3.0)]  # logged before clipping
    assert stepped == [pytest.approx(0.5, rel=1e-4)]
