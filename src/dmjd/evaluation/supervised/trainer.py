"""Supervised training of an evaluation, on the one engine: resumable like pre-training, with a best and a last model.

A task gives its module, its batches and its parameter groups; everything else (schedule, checkpoints, lock, metrics,
signals, validation) stands here.
"""

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from timm.utils import ModelEmaV3
from torch import nn

from dmjd.engine.console import Console
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Duration, Engine, Hook, Report, StopSignal, Task
from dmjd.engine.optim import warmup_cosine
from dmjd.files import write_text
from dmjd.nn.modes import evaluating
from dmjd.runs.checkpoint import (
    FINAL,
    Checkpoint,
    RunFolder,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)

BEST = "best.safetensors"

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

BETAS = (0.9, 0.999)

# start step, fabric (it knows the device) -> endless micro-batches on the device, from a generator that ends its
# processes when closed. What a step gets must follow from its number alone.
Batches = Callable[[int, Fabric], Generator[Any, None, None]]

# model in evaluation mode, under no gradient and the training's autocast -> scores; the first says which is best.
Validate = Callable[[nn.Module], dict[str, float]]


class Stopped(Exception):  # noqa: N818, no error: it was asked for
    """A signal ended the training; its state is saved, and the same call goes on from there."""


@dataclass(frozen=True)
class FitSettings:
    """How a supervised evaluation is trained.

    Attributes:
        steps: optimizer steps. batch_size: images of a step, over all processes and ``accumulate`` micro-batches.
        lr: peak rate, of groups whose ``lr_scale`` is 1. min_lr: what half a cosine ends at.
        warmup: share of the run with a rising rate. clip_grad: largest gradient norm, or None.
        ema: decay of a moving average of the weights, warmed up; it is then what is validated and saved. None: none.
        seed: of dropout and stochastic depth. precision: "auto", "fp32", "bf16" or "fp16".
        num_evals: validations in a run, evenly spaced, besides the last one at its end.
        device: "auto", "cpu" or "cuda". checkpoint_every, log_every: steps. These three may change on resume.

    Raises:
        ValueError: for numbers that cannot be.
    """

    steps: int
    batch_size: int
    lr: float
    min_lr: float = 1e-6
    warmup: float = 0.05
    accumulate: int = 1
    clip_grad: float | None = None
    ema: float | None = None
    seed: int = 0
    precision: str = "auto"
    num_evals: int = 10
    device: str = "auto"
    checkpoint_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"the learning rate must be positive, got {self.lr}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share between 0 and 1, got {self.warmup}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1 (both excluded), got {self.ema}")
        if self.num_evals < 0:
            raise ValueError(f"num_evals must be at least 0, got {self.num_evals}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got '{self.precision}'")

    def identity(self) -> dict[str, Any]:
        """The settings that may not change on resume."""
        return {k: v for k, v in asdict(self).items() if k not in ("device", "checkpoint_every", "log_every")}


@dataclass(frozen=True)
class FitResult:
    """A finished training.

    Attributes:
        model: the module with the last weights (their moving average where one was kept), on its device.
        scores: of the last validation. best: {"step": ..., scores of the best one}. step: steps done.
        folder: with ``checkpoints/final.safetensors`` and ``checkpoints/best.safetensors`` (tensors ``model.*``).
        fabric: the device and precision it was trained with.
    """

    model: Task
    scores: dict[str, float]
    best: dict[str, float]
    step: int
    folder: Path
    fabric: Fabric

    @contextlib.contextmanager
    def testing(self) -> Iterator[Task]:
        """The model in evaluation mode, without gradients, in the precision of the training."""
        with evaluating(self.model), self.fabric.autocast():
            yield self.model

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[Task]:
        """The model with the weights of its best validation; the last ones are put back afterwards."""
        last = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(load_checkpoint(self.folder / "checkpoints" / BEST).part("model"))
        try:
            yield self.model
        finally:
            self.model.load_state_dict(last)


def num_steps(epochs: float | None, steps: int | None, num_images: int, batch_size: int) -> int:
    """Optimizer steps of a duration.

    Raises:
        ValueError: where not exactly one of ``epochs`` and ``steps`` is given, or it is not positive.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("give exactly one of --epochs and --steps")
    value = epochs if epochs is not None else steps
    assert value is not None
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{'epochs' if epochs is not None else 'steps'} must be greater than 0, got {value}")
    return math.ceil(value * num_images / batch_size) if epochs is not None else int(value)


def fit(
    task: Task,
    batches: Batches,
    groups: Sequence[dict[str, Any]],
    settings: FitSettings,
    folder: str | Path,
    *,
    validate: Validate,
    identity: Mapping[str, Any],
    num_images: int,
    name: str = "training",
    console: Console | None = None,
) -> FitResult:
    """Train a task with AdamW; called again with the same folder, go on where it stopped, or return what is finished.

    On CPU a training that was interrupted and resumed ends with the same bits as one that was not.

    Args:
        task: gives the loss; initialized the same way at every call.
        batches: where its batches come from.
        groups: parameter groups with "params", "weight_decay" and, for layer-wise decay, "lr_scale".
        settings: of the training.
        folder: its own folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, a lock.
        validate: scores of the model, larger is better; its images may be a part of those of the final verdict.
        identity: what else the training depends on (data fingerprint, initial weights, task settings), as JSON types.
        num_images: of the training set, to count epochs. name: what messages call it.

    Raises:
        Stopped: after SIGTERM or Ctrl-C, everything saved.
        ValueError: when the folder is in use or holds a training with other settings, or under torchrun: evaluations
            train on one device.
        NonFiniteLoss: when training diverges; the last checkpoint is good.
    """
    fabric = make_fabric(settings.device, settings.precision)
    if fabric.world_size > 1:
        raise ValueError("an evaluation trains on one device: start it without torchrun, in a single task")
    console = console or Console()
    place = RunFolder(folder)
    try:
        _settle(place, {"settings": settings.identity()} | dict(identity))
        return _Fit(task, batches, groups, settings, place, validate, num_images, name, fabric, console).run()
    finally:
        console.close()
        place.close()


def _settle(folder: RunFolder, description: dict[str, Any]) -> None:
    """Write what the training is, or check that it is the one that is here."""
    file = folder.path / "config.json"
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    if file.exists() and (old := file.read_text(encoding="utf-8")) != text:
        changed = sorted(set(old.splitlines()) ^ set(text.splitlines()))[:6]
        listed = "\n  ".join(line.strip() for line in changed)
        raise ValueError(f"{folder.path} holds a training with other settings; move it away:\n  {listed}")
    write_text(file, text)


class _Fit:
    """The parts of one training; :meth:`run` is the reading order."""

    def __init__(
        self,
        task: Task,
        batches: Batches,
        groups: Sequence[dict[str, Any]],
        settings: FitSettings,
        folder: RunFolder,
        validate: Validate,
        num_images: int,
        name: str,
        fabric: Fabric,
        console: Console,
    ) -> None:
        self.task, self.batches, self.settings, self.folder = task, batches, settings, folder
        self.validate, self.num_images, self.name = validate, num_images, name
        self.fabric, self.console = fabric, console
        optimizer = torch.optim.AdamW(list(groups), lr=0.0, betas=BETAS, fused=True)
        self.engine = Engine(
            fabric=fabric,
            task=task,
            optimizer=optimizer,
            duration=Duration(steps=settings.steps),
            peak_lr=settings.lr,
            schedule=partial(warmup_cosine, warmup=settings.warmup, floor=min(1.0, settings.min_lr / settings.lr)),
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            clip_grad=settings.clip_grad,
            seed=settings.seed,
            log_every=settings.log_every,
        )
        self.ema = ModelEmaV3(task, decay=settings.ema, use_warmup=True) if settings.ema is not None else None
        self.scores: dict[str, float] = {}
        self.best: dict[str, float] = {}

    @property
    def model(self) -> Task:
        """What is validated: the moving average, where one is kept."""
        return self.ema.module if self.ema is not None else self.task

    def run(self) -> FitResult:
        """Go on from the newest checkpoint, if any, to the end."""
        checkpoint, problems = self.folder.newest()
        for problem in problems:
            self.console.warn(f"{problem}; going on from an older one")
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.engine.state.step < self.settings.steps:
            if checkpoint is not None:
                self.console.say(f"{self.name}: resumed at step {self.engine.state.step}")
            self._train()
        return FitResult(self.model, self.scores, self.best, self.engine.state.step, self.folder.path, self.fabric)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.scores, self.best = checkpoint.state["scores"], checkpoint.state["best"]
        if checkpoint.path.name == FINAL:  # finished: it holds the model to use and nothing to go on with
            self.engine.load_state_dict(checkpoint.state)
            self.model.load_state_dict(checkpoint.part("model"))
            return
        self.task.load_state_dict(checkpoint.part("model"))
        load_optimizer_tensors(self.engine.optimizer, checkpoint.part("optimizer"))
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.part("ema"))
        self.engine.load_state_dict(checkpoint.state)

    def _train(self) -> None:
        self.folder.cut_metrics(self.engine.state.step)
        hooks: list[Hook] = [self._log, self._look, self._save]
        if self.ema is not None:
            hooks.insert(0, self._average)
        with StopSignal() as stop:
            batches = self.batches(self.engine.state.step, self.fabric)
            try:
                finished = self.engine.run(batches, hooks, stop)
            finally:
                batches.close()  # ends its processes
        if finished:
            self._finish()
        else:
            self._checkpoint()
            step = self.engine.state.step
            self.console.say(f"{self.name}: stopped at step {step}, saved; the same command goes on from there")
            raise Stopped

    def _average(self, report: Report) -> None:
        assert self.ema is not None
        self.ema.update(self.task, report.state.step)

    def _log(self, report: Report) -> None:
        if report.scalars is None:
            return
        progress = report.state
        epoch = progress.images / self.num_images
        self.folder.log({"step": progress.step, "epoch": epoch, "seconds": progress.seconds} | report.scalars)
        self.console.progress(report.progress, progress.step, epoch, progress.seconds, report.scalars)

    def _look(self, report: Report) -> None:
        """Validate where it is due: as often as asked for, at places that follow from the step alone."""
        step, total, num_evals = report.state.step, self.settings.steps, self.settings.num_evals
        if step < total and step * num_evals // total == (step - 1) * num_evals // total:
            return
        self.engine.check_finite()
        with evaluating(self.model), self.fabric.autocast():
            self.scores = self.validate(self.model)
        first = next(iter(self.scores))
        if not self.best or self.scores[first] > self.best[first]:
            self.best = {"step": step} | self.scores
            save_checkpoint(self.folder.checkpoints / BEST, self._weights("model", self.model), self._state())
        self.folder.log({"step": step} | self.scores)
        shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in self.scores.items())
        self.console.say(f"{self.name}, step {step} of {total}: {shown}")

    def _save(self, report: Report) -> None:
        if report.state.step % self.settings.checkpoint_every == 0 and report.progress < 1.0:
            self._checkpoint()

    def _weights(self, part: str, module: nn.Module) -> dict[str, torch.Tensor]:
        return {f"{part}.{key}": value for key, value in module.state_dict().items()}

    def _state(self) -> dict[str, Any]:
        return self.engine.state_dict() | {"scores": self.scores, "best": self.best}

    def _checkpoint(self) -> None:
        """Everything to go on with; never when the weights may be spoilt."""
        self.engine.check_finite()
        tensors = self._weights("model", self.task)
        tensors |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self.engine.optimizer).items()}
        if self.ema is not None:
            tensors |= self._weights("ema", self.ema.module)
        self.folder.save(self.engine.state.step, tensors, self._state())

    def _finish(self) -> None:
        """The last model in place of the step checkpoints, which nothing needs any more."""
        self.engine.check_finite()
        self.folder.save(self.engine.state.step, self._weights("model", self.model), self._state(), final=True)
        for file in self.folder.files():
            file.unlink()
