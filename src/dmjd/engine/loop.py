"""The training loop of pre-training and of all supervised training.

A task returns a loss; logging, evaluation and checkpoints are hooks. Runs on Lightning Fabric: one device or many, any
precision, torchrun and SLURM.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from dmjd.engine.cooldown import Cooldown
from dmjd.engine.device import loss_scaler, peak_memory, precision_name, seed_device, unscale_gradients
from dmjd.engine.optim import group_factor, reserve_state
from dmjd.engine.sharding import WholeModel, is_sharded, whole
from dmjd.engine.stop_signal import StopSignal
from dmjd.rng import STREAM_STEP, hash64

SYNC_EVERY = 10  # steps between reads of device-side flags on an accelerator, each of which waits for the device


class NonFiniteLoss(FloatingPointError):  # noqa: N818, the name is the error
    """The loss or its gradient is not finite; the weights are those of the step before."""


@dataclass
class TrainState:
    """The loop's state besides tensors; part of every checkpoint."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0  # training time, with waiting for data, without hooks


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


class Task(nn.Module):
    """A module to train: ``forward(batch) -> {"loss": scalar, other scalars to log}``."""

    def after_step(self, step: int, progress: float) -> None:
        """Called after optimizer step ``step`` (from 1).

        ``progress`` is that of the run (0 to 1); of a run with a cooldown, that of the cooldown, which is 0 before.
        """


@dataclass(frozen=True)
class Report:
    """Passed to hooks after each step.

    Attributes:
        state: the loop's state.
        progress: progress of the run, 0 to 1.
        scalars: means since the last logged step over all processes, if this step is logged.
        before: progress before the step.
        live: means since the last logged step, of this process, to be shown while training; not in every process, and
            only if ``scalars`` is None.
    """

    state: TrainState
    progress: float
    scalars: dict[str, float] | None
    before: float = 0.0
    live: dict[str, float] | None = None


Hook = Callable[[Report], None]


@dataclass
class Engine:
    """The training loop.

    Args:
        fabric: a launched Fabric.
        task: the module to train, not wrapped; sharded if that is the strategy of ``fabric``.
        optimizer: optimizer of its parameters. A group with an "lr_scale" (timm's key for layer-wise decay) uses that
            multiple of the learning rate, one with a "frozen_until" is not trained before that progress. On an
            accelerator, fused optimizers skip a non-finite step without waiting for the device; others wait once a
            step.
        duration: length of the run.
        peak_lr: peak learning rate.
        schedule: progress -> factor on the peak learning rate. With a :class:`Cooldown` nothing before it depends on
            the duration.
        warmup: fraction of the run over which the rate of a group rises that was frozen.
        warmup_steps: steps over which the learning rate rises, besides what the schedule does.
        batch_size: images per step over all processes.
        accumulate: micro-batches per step.
        clip_grad: largest gradient norm, or None.
        seed: seed of dropout and stochastic depth.
        log_every: steps between scalars.
        compile: use ``torch.compile``.
        whole: the whole of a sharded model, for evaluations and checkpoints.

    Attributes:
        state: step, images and seconds so far.
        computing: whether gradients of a step are being computed.
        updating: whether the weights are between two steps, as after an error in the middle of an update; otherwise
            they are those of step ``state.step``.
        before: progress before the last step.
    """

    fabric: Fabric
    task: Task
    optimizer: torch.optim.Optimizer
    duration: Duration
    peak_lr: float
    schedule: Callable[[float], float]
    batch_size: int
    warmup: float = 0.0
    warmup_steps: int = 0
    accumulate: int = 1
    clip_grad: float | None = None
    seed: int = 0
    log_every: int = 20
    compile: bool = False
    whole: WholeModel | None = None
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self._scaled = precision_name(self.fabric) == "fp16"
        self._eager = self.fabric.device.type == "cpu"  # reading a value does not block
        self._sharded = is_sharded(self.fabric)
        self._skips_on_device = bool(self.optimizer.defaults.get("fused")) and not self._sharded
        at_once = self.compile and not self._sharded  # a sharded model was compiled block by block
        module: nn.Module = torch.compile(self.task) if at_once else self.task  # type: ignore[assignment]
        self._model, self._optimizer = self.fabric.setup(module, self.optimizer)
        if self._eager and isinstance(self.optimizer, torch.optim.AdamW):
            reserve_state(self.optimizer)
        self.computing, self.updating, self.before = False, False, self.progress
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.fabric.device)

    @property
    def progress(self) -> float:
        """Progress of the run, 0 to 1."""
        return self.duration.progress(self.state)

    @property
    def cooldown(self) -> Cooldown | None:
        """The schedule, if it is constant with a cooldown at the end."""
        return self.schedule if isinstance(self.schedule, Cooldown) else None

    def run(
        self, batches: Iterator[Any], hooks: Sequence[Hook], stop: StopSignal, show_every: float | None = None
    ) -> bool:
        """Train to the end of the duration, or until a stop is requested.

        Args:
            batches: endless micro-batches, starting at the current step.
            hooks: called after every step.
            show_every: seconds between reports with scalars, the first one after the first step, besides those of
                logged steps; None: none. On an accelerator each waits for the device.

        Returns:
            Whether the duration is over.

        Raises:
            NonFiniteLoss: naming the step, whose update was not applied.
            StopNow: if a stop was requested and data or a hook does not end; the weights are those of the last step.
        """
        meter = _Meter(self.fabric.device, show_every)
        self._model.train()
        progress = self._shared_progress()
        while progress < 1.0:
            started = time.perf_counter()
            lr = self.peak_lr * self.schedule(progress)
            if self.state.step < self.warmup_steps:
                lr *= self.state.step / self.warmup_steps
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group_factor(group, progress, self.warmup)
            self._step(batches, meter, stop)
            step = self.state.step = self.state.step + 1
            self.state.images += self.batch_size
            self.task.after_step(step, self.cooldown.share(progress) if self.cooldown is not None else self.progress)
            self.updating = False
            self.state.seconds += time.perf_counter() - started
            self.before, progress = progress, self._shared_progress()
            sync = self._eager or self.fabric.world_size == 1 or step % SYNC_EVERY == 0 or progress >= 1.0
            stopping = self._agree_on_stop(stop) if sync else False
            scalars = live = None
            if step % self.log_every == 0 or progress >= 1.0 or stopping:
                self.check_finite()
                scalars = meter.read(self.batch_size, self._mean_over_processes) | {"lr": lr}
                meter.reset()
            elif meter.is_due() and self._is_finite():
                live = meter.read(self.batch_size) | {"lr": lr}
            report = Report(self.state, progress, scalars, self.before, live)
            hooked = time.perf_counter()
            for hook in hooks:
                hook(report)
            meter.elsewhere += time.perf_counter() - hooked
            if stopping and progress < 1.0:
                return False
        return True

    def _step(self, batches: Iterator[Any], meter: "_Meter", stop: StopSignal) -> None:
        """One optimizer step over ``accumulate`` micro-batches; a non-finite one is skipped."""
        step, rank, self.computing = self.state.step, self.fabric.global_rank, True
        loss = torch.zeros((), device=self.fabric.device)
        for part in range(self.accumulate):
            waited = time.perf_counter()
            with stop.interruptible():
                batch = next(batches)
            meter.waited += time.perf_counter() - waited
            # Seeds derived from the step make dropout exact on resume without saving generator states.
            seed_device(self.fabric.device, int(hash64(STREAM_STEP, self.seed, step, part, rank)) & (2**63 - 1))
            # Sums of whole gradients are what sharded training has no memory for: it adds up parts.
            synchronized = part == self.accumulate - 1 or self._sharded
            with nullcontext() if synchronized else self.fabric.no_backward_sync(self._model):
                out = self._model(batch)
                self.fabric.backward(out["loss"] / self.accumulate)
            loss = loss + out["loss"].detach()
            meter.add(out, self.accumulate)
        meter.add({"grad_norm": self.update(loss)}, 1)

    def update(self, loss: Tensor) -> Tensor:
        """Clip the gradients, check them, step; returns the gradient norm before clipping, a scalar."""
        norm = self._gradient_norm()
        self._check_step(loss, norm)
        self.computing, self.updating = False, True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient; gradients are clipped if ``clip_grad`` is set."""
        if self._scaled:
            unscale_gradients(self.fabric, self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        return norm

    def _check_step(self, loss: Tensor, norm: Tensor) -> None:
        """Mark a non-finite step, so that neither it nor any later step changes the weights.

        With fp16 infinite gradients are normal (the loss scaler handles them), so only the loss is checked.
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
            # Fused optimizers skip their update on the device if this is 1.
            self.optimizer.found_inf = (self._bad_step >= 0).to(torch.float32)  # type: ignore[attr-defined]

    def _is_finite(self) -> bool:
        """Whether no step was marked as non-finite. Several processes raise that error together, at a logged step."""
        if self.fabric.world_size == 1:
            self.check_finite()
        return int(self._bad_step) < 0

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteLoss` if a step was marked as non-finite; waits for the device."""
        step = int(self._bad_step)
        if step >= 0:
            raise NonFiniteLoss(
                f"the loss or its gradient is not finite at step {step}; the step was not applied and the last "
                "checkpoint is good. Try a lower --blr, --clip-grad 1, or --precision fp32, in a new --out"
            )

    def _shared_progress(self) -> float:
        """Progress, the same in all processes."""
        progress = self.progress
        if self.fabric.world_size > 1 and self.duration.steps is None:  # clocks differ: use the first process's
            value = torch.tensor([progress, self.state.seconds], dtype=torch.float64, device=self.fabric.device)
            torch.distributed.broadcast(value, 0)
            progress, self.state.seconds = value.tolist()
        return progress

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        """The mean of each value, to be called in all processes."""
        if self.fabric.world_size == 1:
            return values
        return self.fabric.all_reduce(values, reduce_op="mean")  # type: ignore[return-value]

    def _agree_on_stop(self, stop: StopSignal) -> bool:
        """Whether a stop was requested in any process."""
        if self.fabric.world_size == 1:
            return bool(stop.requested)
        requested = torch.tensor(float(stop.requested > 0), device=self.fabric.device)
        return float(self.fabric.all_reduce(requested, reduce_op="sum")) > 0  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """State of the loop and, with fp16, of the loss scaler, as JSON types for a checkpoint."""
        scaler = loss_scaler(self.fabric)
        return {"progress": asdict(self.state), "scaler": scaler.state_dict() if scaler is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.state = TrainState(**state["progress"])
        scaler = loss_scaler(self.fabric)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])


class _Meter:
    """Sums of scalars, kept on the device until they are logged.

    Args:
        device: device of the scalars.
        show_every: seconds between reads besides those of logged steps, the first at once; None: no such reads.
    """

    def __init__(self, device: torch.device, show_every: float | None = None) -> None:
        self._device, self._show_every, self._read_at = device, show_every, -math.inf
        self.reset()

    def is_due(self) -> bool:
        """Whether the scalars are to be shown."""
        return self._show_every is not None and time.monotonic() - self._read_at >= self._show_every

    def reset(self) -> None:
        """Forget all steps so far."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.waited = self.elsewhere = 0.0
        self._since = time.perf_counter()

    def add(self, values: dict[str, Tensor], accumulate: int) -> None:
        for name, value in values.items():
            value = value.detach().float() / accumulate
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += "grad_norm" in values

    def read(self, batch_size: int, shared: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means since the last reset, images/s, the fraction of time spent waiting for data, and peak memory.

        The time of hooks, such as evaluations, does not count. ``shared`` makes means those of all processes.
        """
        sums = torch.stack(list(self._sums.values()))
        totals = (sums if shared is None else shared(sums)).tolist()  # waits for the device
        means = {name: total / self._steps for name, total in zip(self._sums, totals, strict=True)}
        seconds = max(time.perf_counter() - self._since - self.elsewhere, 1e-9)
        speed = {"images_per_s": batch_size * self._steps / seconds, "data_wait": self.waited / seconds}
        self._read_at = time.monotonic()
        return means | speed | {"memory_gb": peak_memory(self._device) / 1e9}
