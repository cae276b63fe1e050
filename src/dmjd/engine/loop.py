"""The only training loop. It knows no method and no run configuration: a task gives a loss, hooks do the rest.

On Lightning Fabric: one device or many, any precision, torchrun and SLURM.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from dmjd.engine.device import seed_device
from dmjd.engine.optim import reserve_state
from dmjd.rng import STREAM_STEP, hash64

SYNC_EVERY = 10  # steps between looks at device-side flags on an accelerator, where each look waits for it


class NonFiniteLoss(FloatingPointError):  # noqa: N818, the name says what is wrong
    """The loss or its gradient is not finite; the weights are those before the step."""


@dataclass
class TrainState:
    """All state of the loop besides tensors; goes into every checkpoint."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0  # of training: waiting for data counts, hooks do not


@dataclass(frozen=True)
class Duration:
    """Length of a run in optimizer steps or in minutes of training."""

    steps: int | None = None
    minutes: float | None = None

    def progress(self, state: TrainState) -> float:
        """Progress of the run, 0 to 1."""
        if self.steps is not None:
            return min(1.0, state.step / self.steps)
        assert self.minutes is not None
        return min(1.0, state.seconds / (60 * self.minutes))


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])


class Task(nn.Module):
    """What is trained: ``forward(batch) -> {"loss": scalar, other scalars to log}``."""

    def after_step(self, step: int, progress: float) -> None:
        """Called after optimizer step ``step`` (from 1), at ``progress`` of the run (0 to 1)."""


@dataclass(frozen=True)
class Report:
    """What hooks receive after a step: the loop's state, progress of the run (0 to 1), and scalars if it was logged."""

    state: TrainState
    progress: float
    scalars: dict[str, float] | None


Hook = Callable[[Report], None]


@dataclass
class Engine:
    """The loop.

    Args:
        fabric: launched. task: the plain module. optimizer: over its parameters. A fused one, such as AdamW, costs
            no wait for an accelerator to skip a step that is not finite; others cost one a step. A group with an
            "lr_scale" (timm's name for layer-wise decay) learns at that multiple of the rate.
        duration: length. peak_lr: learning rate at the schedule's top. schedule: progress of the run -> factor on it.
        accumulate: micro-batches a step. clip_grad: largest gradient norm, or None. batch_size: images a step over
            all processes. seed: of dropout and stochastic depth. log_every: steps between scalars.
        compile: torch.compile the task.
    """

    fabric: Fabric
    task: Task
    optimizer: torch.optim.Optimizer
    duration: Duration
    peak_lr: float
    schedule: Callable[[float], float]
    batch_size: int
    accumulate: int = 1
    clip_grad: float | None = None
    seed: int = 0
    log_every: int = 20
    compile: bool = False
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self._scaled = self.fabric._precision.precision == "16-mixed"
        self._eager = self.fabric.device.type == "cpu"  # looking at a value costs nothing
        self._skips_on_device = bool(self.optimizer.defaults.get("fused"))
        module: nn.Module = torch.compile(self.task) if self.compile else self.task  # type: ignore[assignment]
        self._model, self._optimizer = self.fabric.setup(module, self.optimizer)
        if self._eager and isinstance(self.optimizer, torch.optim.AdamW):
            reserve_state(self.optimizer)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.fabric.device)

    def run(self, batches: Iterator[Any], hooks: Sequence[Hook], stop: StopSignal) -> bool:
        """Train until the duration is over or a stop is asked for.

        Args:
            batches: endless micro-batches from the current step on.
            hooks: called after every step.

        Returns:
            whether the run is finished.

        Raises:
            NonFiniteLoss: naming the step; its update has not been made.
        """
        meter = _Meter(self.fabric.device)
        self._model.train()
        progress = self._progress()
        while progress < 1.0:
            started = time.perf_counter()
            lr = self.peak_lr * self.schedule(progress)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            self._step(batches, meter)
            step = self.state.step = self.state.step + 1
            self.state.images += self.batch_size
            self.task.after_step(step, self.duration.progress(self.state))
            self.state.seconds += time.perf_counter() - started
            progress = self._progress()
            sync = self._eager or step % SYNC_EVERY == 0 or progress >= 1.0
            stopping = self._agree_on_stop(stop) if sync else False
            scalars = None
            if step % self.log_every == 0 or progress >= 1.0 or stopping:
                self.check_finite()
                scalars = meter.read(self.batch_size) | {"lr": lr}
            report = Report(self.state, progress, scalars)
            for hook in hooks:
                hook(report)
            if stopping and progress < 1.0:
                return False
        return True

    def _step(self, batches: Iterator[Any], meter: "_Meter") -> None:
        """One optimizer step over ``accumulate`` micro-batches, skipped on the device if it is not finite."""
        step, rank = self.state.step, self.fabric.global_rank
        loss = torch.zeros((), device=self.fabric.device)
        for part in range(self.accumulate):
            waited = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - waited
            # Seeding from the step makes dropout exact on resume without saving any generator.
            seed_device(self.fabric.device, int(hash64(STREAM_STEP, self.seed, step, part, rank)) & (2**63 - 1))
            last = part == self.accumulate - 1
            with nullcontext() if last else self.fabric.no_backward_sync(self._model):
                out = self._model(batch)
                self.fabric.backward(out["loss"] / self.accumulate)
            loss = loss + out["loss"].detach()
            meter.add(out, self.accumulate)
        meter.add({"grad_norm": self.update(loss)}, 1)

    def update(self, loss: Tensor) -> Tensor:
        """Clip, guard, optimizer step from the gradients that are there; returns the gradient's norm, a scalar."""
        norm = self._gradient_norm()
        self._guard(loss, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping; clips where asked to."""
        if self._scaled:
            self.fabric._precision.unscale_gradients(self._optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        return norm

    def _guard(self, loss: Tensor, norm: Tensor) -> None:
        """Mark a step that is not finite, so that neither it nor any later one changes the weights.

        fp16's loss scaler meets infinite gradients in ordinary life, so there the loss alone decides.
        """
        finite = torch.isfinite(loss) if self._scaled else torch.isfinite(loss) & torch.isfinite(norm)
        bad = (~finite).to(torch.float32)
        if self.fabric.world_size > 1:
            bad = self.fabric.all_reduce(bad, reduce_op="sum")  # type: ignore[assignment]
        first = (bad > 0) & (self._bad_step < 0)
        self._bad_step = torch.where(first, self.state.step + 1, self._bad_step)
        if self._eager or self._scaled or not self._skips_on_device:
            self.check_finite()
        else:
            # Fused optimizers skip their update on the device where this is 1: no wait for the device.
            self.optimizer.found_inf = (self._bad_step >= 0).to(torch.float32)  # type: ignore[attr-defined]

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteLoss` if a step was marked; waits for the device."""
        step = int(self._bad_step)
        if step >= 0:
            raise NonFiniteLoss(
                f"the loss or its gradient is not finite at step {step}; the step was not made and the last checkpoint "
                "is good. Try a lower --blr, --clip-grad 1, or --precision fp32, in a new --out"
            )

    def _progress(self) -> float:
        progress = self.duration.progress(self.state)
        if self.fabric.world_size > 1 and self.duration.steps is None:  # clocks differ; the first process decides
            value = torch.tensor([progress, self.state.seconds], dtype=torch.float64, device=self.fabric.device)
            torch.distributed.broadcast(value, 0)
            progress, self.state.seconds = value.tolist()
        return progress

    def _agree_on_stop(self, stop: StopSignal) -> bool:
        if self.fabric.world_size == 1:
            return stop.requested
        asked = torch.tensor(float(stop.requested), device=self.fabric.device)
        return float(self.fabric.all_reduce(asked, reduce_op="sum")) > 0  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint: the loop's and, with fp16, the loss scaler's."""
        scaler = getattr(self.fabric._precision, "scaler", None)
        return {"progress": asdict(self.state), "scaler": scaler.state_dict() if scaler is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.state = TrainState(**state["progress"])
        scaler = getattr(self.fabric._precision, "scaler", None)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])


class _Meter:
    """Sums of scalars, kept on the device until a line of metrics is due."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.waited = 0.0
        self._since = time.perf_counter()

    def add(self, values: dict[str, Tensor], accumulate: int) -> None:
        for name, value in values.items():
            value = value.detach().float() / accumulate
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += "grad_norm" in values

    def read(self, batch_size: int) -> dict[str, float]:
        """Means since the last call, images/s and the share of time spent waiting for data; starts afresh."""
        means = {name: float(total) / self._steps for name, total in self._sums.items()}  # waits for the device
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = {"images_per_s": batch_size * self._steps / seconds, "data_wait": self.waited / seconds}
        self._reset()
        return means | speed
