"""``fit``: supervised training with AdamW, resumable like pre-training. The best and the last model are kept."""

import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import torch
from lightning.fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dmjd.config.dense import DenseConfig
from dmjd.config.finetune import FinetuneConfig
from dmjd.config.schedules import steps_of_epochs
from dmjd.encoders.headers import CHECKPOINTS, FINAL, read_header
from dmjd.engine.console import Console
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Duration, Engine, Report, Task
from dmjd.engine.optim import warmup_cosine
from dmjd.files import remove, write_text
from dmjd.nn.modes import evaluating
from dmjd.regular import check_regular
from dmjd.runs.callback import Callback
from dmjd.runs.checkpoint import (
    KEEP,
    Checkpoint,
    RunFolder,
    load_checkpoint,
    named_tensors,
    newest_checkpoint,
    save_checkpoint,
)
from dmjd.runs.driver import Driver

BEST = "best.safetensors"  # of version 0.1; now the name holds the step, see best_file

BETAS = (0.9, 0.999)

# start step, fabric (for the device) -> endless micro-batches on the device, from a generator that ends its
# worker processes when closed. The batches of a step may depend on its number only.
Batches = Callable[[int, Fabric], Generator[Any, None, None]]

# model in evaluation mode, without gradients, under the training's autocast -> scores; the first one selects the best.
Validate = Callable[[nn.Module], dict[str, float]]


class FitState(TypedDict):
    """What the metadata of a checkpoint holds besides that of every checkpoint."""

    scores: dict[str, float]
    best: dict[str, float]
    scaler: NotRequired[dict[str, Any] | None]


class Stopped(Exception):  # noqa: N818, not an error: it was requested
    """A signal stopped the training. Its state is saved, and the same call resumes it."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of a supervised training.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step, over all ``accumulate`` micro-batches.
        lr: peak learning rate, of groups whose ``lr_scale`` is 1.
        min_lr: learning rate at the end.
        warmup: progress (0 to 1) at the peak.
        clip_grad: largest gradient norm, or None.
        ema: decay of a moving average of the weights, with warm-up, which is validated and saved; None: off.
        seed: seed of dropout and stochastic depth.
        precision: "auto", "fp32", "bf16" or "fp16".
        num_evals: validations per run, evenly spaced, besides the one at the end.
        device: "auto", "cpu" or "cuda"; may change on resume.
        checkpoint_every: steps between checkpoints; may change on resume.
        log_every: steps between logged scalars; may change on resume.
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

    @classmethod
    def from_config(cls, config: FinetuneConfig | DenseConfig, num_images: int, **others: Any) -> Self:
        """Settings of a resolved configuration.

        Args:
            config: resolved configuration.
            num_images: size of the training set.
            others: fields that the configuration does not have.
        """
        assert config.batch_size is not None
        assert config.blr is not None
        return cls(
            steps=num_steps(config.epochs, config.steps, num_images, config.batch_size),
            batch_size=config.batch_size,
            lr=config.blr * config.batch_size / 256,
            min_lr=config.min_lr,
            accumulate=config.accumulate,
            clip_grad=config.clip_grad,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            **others,
        )

    def identity(self) -> dict[str, Any]:
        """The settings that may not change on resume."""
        return {k: v for k, v in asdict(self).items() if k not in ("device", "checkpoint_every", "log_every")}


@dataclass(frozen=True)
class FitResult:
    """A finished training.

    Attributes:
        model: the module with the last weights (their moving average if one was kept), on its device.
        scores: scores of the last validation.
        best: {"step": ..., scores of the best validation}.
        step: steps done.
        folder: holds ``checkpoints/final.safetensors`` and ``checkpoints/best-<step>.safetensors`` (tensors
            ``model.*``).
        fabric: device and precision of the training.
    """

    model: Task
    scores: dict[str, float]
    best: dict[str, float]
    step: int
    folder: Path
    fabric: Fabric

    @contextmanager
    def testing(self) -> Iterator[Task]:
        """The model in evaluation mode, without gradients, in the precision of the training."""
        with evaluating(self.model), self.fabric.autocast():
            yield self.model

    @contextmanager
    def best_weights(self) -> Iterator[Task]:
        """The model with the weights of its best validation; the last weights are restored afterwards."""
        last = {key: value.clone() for key, value in self.model.state_dict().items()}
        best = best_file(self.folder / CHECKPOINTS, int(self.best["step"]))
        self.model.load_state_dict(load_checkpoint(best).part("model"))
        try:
            yield self.model
        finally:
            self.model.load_state_dict(last)


def best_file(checkpoints: Path, step: int) -> Path:
    """The file of the best model, which belongs to a step of validation.

    Its name holds the step, so that a kill between this file and the next checkpoint cannot exchange the weights
    behind the scores in the last checkpoint.

    Raises:
        ValueError: if there is no such file.
    """
    file = checkpoints / f"best-{step:09d}.safetensors"
    for candidate in (file, checkpoints / BEST):
        if candidate.exists() and read_header(candidate).step == step:
            return candidate
    raise ValueError(f"{file} is missing; delete {checkpoints.parent} to train again")


def num_steps(epochs: float | None, steps: int | None, num_images: int, batch_size: int) -> int:
    """Optimizer steps of a duration.

    Raises:
        ValueError: unless exactly one of ``epochs`` and ``steps`` is given, and it is positive.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("give exactly one of --epochs and --steps")
    value = epochs if epochs is not None else steps
    assert value is not None
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{'epochs' if epochs is not None else 'steps'} must be greater than 0, got {value}")
    return steps_of_epochs(epochs, num_images, batch_size) if epochs is not None else int(value)


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
    """Train a task with AdamW. Called again with the same folder, it resumes, or returns the finished result.

    On CPU an interrupted and resumed training ends with the same bits as an uninterrupted one.

    Args:
        task: module that returns the loss; initialized the same way at every call.
        batches: function that returns the batches.
        groups: parameter groups with "params", "weight_decay" and, for layer-wise decay, "lr_scale".
        settings: settings of the training.
        folder: folder of this training: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, a lock.
        validate: scores of the model, larger is better. It may use a part of the test images only.
        identity: everything else the training depends on (data, initial weights, task settings), as JSON types.
        num_images: size of the training set, to count epochs.
        name: prefix of messages.

    Raises:
        Stopped: after SIGTERM or Ctrl-C; everything is saved.
        ValueError: if the folder is in use or holds a training with other settings, or under torchrun: evaluations
            train on one device.
        NonFiniteLoss: if training diverges; the last checkpoint is good.
    """
    fabric = make_fabric(settings.device, settings.precision, distributed=False)
    console = console or Console()
    with closing(RunFolder(folder)) as run, closing(console):
        _validate_config(run, {"settings": settings.identity()} | dict(identity))
        checkpoint = newest_checkpoint(run, console, FitState)
        engine = _make_engine(task, groups, settings, fabric)
        validation = Validation(engine, settings, validate, run, console, name)
        driver = Driver(
            engine,
            task,
            run,
            console,
            lambda step: batches(step, fabric),
            num_images,
            settings.checkpoint_every,
            validation,
            name=name,
        )
        driver.restore(checkpoint)
        if checkpoint is not None and engine.progress < 1.0:
            console.say(f"{name}: resumed at step {engine.state.step}")
        if not driver.run():
            raise Stopped
        validation.after_save(final=True)  # again: a kill may have come before, with the final checkpoint written
    return FitResult(validation.model, validation.scores, validation.best, engine.state.step, run.path, fabric)


def _validate_config(folder: RunFolder, description: dict[str, Any]) -> None:
    """Check that the folder does not hold another training, and write the description of this one."""
    file = folder.path / "config.json"
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    try:
        check_regular(file)
        old = file.read_bytes().decode(errors="replace") if file.exists() else text
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; move {folder.path} away") from None
    if old != text:
        changed = sorted(set(old.splitlines()) ^ set(text.splitlines()))[:6]
        listed = "\n  ".join(line.strip() for line in changed)
        raise ValueError(f"{folder.path} holds a training with other settings; move it away:\n  {listed}")
    write_text(file, text)


def _make_engine(task: Task, groups: Sequence[dict[str, Any]], settings: FitSettings, fabric: Fabric) -> Engine:
    return Engine(
        fabric=fabric,
        task=task,
        optimizer=torch.optim.AdamW(list(groups), lr=0.0, betas=BETAS, fused=True),
        duration=Duration(steps=settings.steps),
        peak_lr=settings.lr,
        schedule=partial(warmup_cosine, warmup=settings.warmup, floor=min(1.0, settings.min_lr / settings.lr)),
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        clip_grad=settings.clip_grad,
        seed=settings.seed,
        log_every=settings.log_every,
    )


class Validation(Callback):
    """Validates a training at intervals, keeps the best model and, if configured, a moving average of the weights.

    Attributes:
        model: what is validated: the moving average if there is one, else the task.
        scores: scores of the last validation.
        best: {"step": ..., scores of the best one}.
    """

    def __init__(
        self,
        engine: Engine,
        settings: FitSettings,
        validate: Validate,
        folder: RunFolder,
        console: Console,
        name: str,
    ) -> None:
        self.engine, self.settings, self.validate = engine, settings, validate
        self.folder, self.console, self.name = folder, console, name
        self.average: ModelEmaV3 | None = None
        self.model = engine.task
        if settings.ema is not None:
            self.average = ModelEmaV3(engine.task, decay=settings.ema, use_warmup=True)
            self.model = self.average.module
        self.scores: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self._saved_bests: deque[float] = deque(maxlen=KEEP)  # steps of the best models of the kept checkpoints

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore scores, moving average and, from the checkpoint of a finished training, the model."""
        self.scores, self.best = checkpoint.state["scores"], checkpoint.state["best"]
        if self.best:
            self._saved_bests.append(self.best["step"])
            best_file(self.folder.checkpoints, int(self.best["step"]))
        if checkpoint.path.name == FINAL:
            self.model.load_state_dict(checkpoint.part("model"))
        elif self.average is not None:
            self.average.module.load_state_dict(checkpoint.part("ema"))

    def state(self) -> dict[str, Any]:
        """Scores so far."""
        return {"scores": self.scores, "best": self.best}

    def tensors(self, tensors: dict[str, Tensor], final: bool) -> dict[str, Tensor]:
        """Add the moving average; the final checkpoint holds the model only."""
        if final:
            return named_tensors("model", self.model)
        return tensors | (named_tensors("ema", self.average.module) if self.average is not None else {})

    def after_save(self, final: bool) -> None:
        """Delete the best models that no checkpoint names, and the step checkpoints of a finished training."""
        if final:
            self._saved_bests.clear()
            for file in self.folder.files():
                remove(file)
        self._saved_bests.append(self.best.get("step", -1))
        for file in self.folder.checkpoints.glob("best-*.safetensors"):
            if file.stem.removeprefix("best-") not in {f"{step:09.0f}" for step in self._saved_bests}:
                remove(file)

    def after_step(self, report: Report) -> None:
        """Update the moving average."""
        if self.average is not None:
            self.average.update(self.engine.task, report.state.step)

    def is_due(self, report: Report) -> bool:
        """Evaluations are evenly spaced, and at the end. Whether a step is due depends on its number only."""
        step, total, num_evals = report.state.step, self.settings.steps, self.settings.num_evals
        return step >= total or step * num_evals // total > (step - 1) * num_evals // total

    def evaluate(self, report: Report) -> dict[str, float]:
        """Validate the model, and save it if it is the best so far."""
        with evaluating(self.model), self.engine.fabric.autocast():
            self.scores = self.validate(self.model)
        step, first = report.state.step, next(iter(self.scores))
        if not self.best or self.scores[first] > self.best[first]:
            self.best = {"step": step} | self.scores
            state = self.engine.state_dict() | self.state()
            file = self.folder.checkpoints / f"best-{step:09d}.safetensors"
            save_checkpoint(file, named_tensors("model", self.model), state)
        shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in self.scores.items())
        self.console.say(f"{self.name}, step {step} of {self.settings.steps}: {shown}")
        return self.scores
