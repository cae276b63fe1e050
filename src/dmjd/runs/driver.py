"""The driver of every training: restore, log, evaluate at intervals, save at intervals, final checkpoint."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dmjd.engine.console import Console
from dmjd.engine.loggers import Logger
from dmjd.engine.loop import Engine, Hook, Report, StopSignal
from dmjd.runs.checkpoint import (
    Checkpoint,
    RunFolder,
    load_optimizer_tensors,
    named_tensors,
    one_line,
    optimizer_tensors,
)


class Callback:
    """The part that differs between trainings. All methods are optional; only ``restore`` runs in every process."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore what :meth:`state` and :meth:`tensors` saved; ValueError if the checkpoint belongs to other data."""

    def after_restore(self) -> None:
        """Called in the first process when everything is restored: write what is missing or stale."""

    def start(self, step: int, progress: float) -> Sequence[Logger]:
        """Called before the first step. Returns destinations of scalars besides ``metrics.jsonl``."""
        return ()

    def after_step(self, report: Report) -> None:
        """Called after every step, before evaluation."""

    def is_due(self, report: Report) -> bool:
        """Whether to evaluate after this step."""
        return False

    def evaluate(self, report: Report) -> dict[str, float]:
        """Evaluate the model. Returns scalars to log."""
        return {}

    def state(self) -> dict[str, Any]:
        """Additional state for a checkpoint, as JSON types."""
        return {}

    def tensors(self, tensors: dict[str, Tensor], final: bool) -> dict[str, Tensor]:
        """The tensors of a checkpoint, given those of model and optimizer."""
        return tensors

    def after_save(self, final: bool) -> None:
        """Called after a checkpoint was written."""


@dataclass
class Driver:
    """Runs a training in its folder, resumable at any step.

    Args:
        engine: the loop.
        model: saved under ``model.*``.
        folder: folder of the training.
        console: for messages.
        batches: start step -> endless micro-batches, from a generator that ends its worker processes when closed.
            The batches of a step may depend on its number only.
        num_images: size of the training set, to count epochs.
        checkpoint_every: steps between checkpoints.
        callback: the part that is specific to this training.
        hooks: more hooks of the engine.
        name: prefix of messages.

    Attributes:
        metrics: the last line of ``metrics.jsonl``.
    """

    engine: Engine
    model: nn.Module
    folder: RunFolder
    console: Console
    batches: Callable[[int], Generator[Any, None, None]]
    num_images: int
    checkpoint_every: int
    callback: Callback
    hooks: Sequence[Hook] = ()
    name: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._warned_of_metrics = False

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Continue from a checkpoint, if there is one; a final one may hold no optimizer state, only the result.

        Metrics of later steps, which will be repeated, are deleted, and files that do not fit the checkpoint, e.g.
        after a kill between two writes, are written again.

        Raises:
            ValueError: if the checkpoint belongs to other data or to another model.
        """
        if checkpoint is not None:
            try:
                self.callback.restore(checkpoint)
                self.engine.load_state_dict(checkpoint.state)
                if optimizer := checkpoint.part("optimizer"):
                    self.model.load_state_dict(checkpoint.part("model"))
                    load_optimizer_tensors(self.engine.optimizer, optimizer)
            except (RuntimeError, TypeError, KeyError) as error:
                raise ValueError(f"{checkpoint.path} does not fit this training: {one_line(error)}") from None
        if self.folder.owner:
            if damaged := self.folder.cut_metrics(self.engine.state.step):
                self.console.warn(f"{self.folder.metrics}: {damaged} damaged line(s) are left out")
            if checkpoint is not None:
                self.callback.after_restore()

    def run(self) -> bool:
        """Train to the end, or until a signal requests a stop; the state is saved either way.

        Returns:
            Whether the training is finished.
        """
        if self.engine.progress >= 1.0:
            return True
        self._loggers: Sequence[Logger] = ()
        batches = self.batches(self.engine.state.step)
        try:
            hooks: list[Hook] = []
            if self.folder.owner:  # one process logs, evaluates and saves
                self._loggers = self.callback.start(self.engine.state.step, self.engine.progress)
                hooks = [self.callback.after_step, self._log, self._evaluate, self._save, *self.hooks]
            with StopSignal() as stop, closing(batches):
                finished = self.engine.run(batches, hooks, stop)
        finally:
            for logger in self._loggers:
                logger.close()
            self.console.close()
        if self.folder.owner:
            self.save(final=finished)
        if not finished:
            prefix = f"{self.name}: " if self.name else ""
            step = self.engine.state.step
            self.console.say(f"{prefix}stopped at step {step}, checkpoint saved; the same command resumes from there")
        return finished

    def save(self, final: bool = False) -> None:
        """Write a checkpoint, unless a step was not finite: the last good one stays."""
        self.engine.check_finite()
        optimizer = optimizer_tensors(self.engine.optimizer)
        tensors = named_tensors("model", self.model) | {f"optimizer.{key}": value for key, value in optimizer.items()}
        state = self.engine.state_dict() | self.callback.state()
        self.folder.save(self.engine.state.step, self.callback.tensors(tensors, final), state, final=final)
        self.callback.after_save(final)

    def _log(self, report: Report) -> None:
        if report.scalars is None:
            return
        state, epoch = report.state, report.state.images / self.num_images
        self._record(state.step, {"epoch": epoch, "seconds": state.seconds} | report.scalars)
        self.console.progress(report.progress, state.step, epoch, state.seconds, report.scalars)

    def _evaluate(self, report: Report) -> None:
        if self.callback.is_due(report):
            self.engine.check_finite()
            if scores := self.callback.evaluate(report):
                self._record(report.state.step, scores)

    def _save(self, report: Report) -> None:
        if report.state.step % self.checkpoint_every == 0 and report.progress < 1.0:
            self.save()

    def _record(self, step: int, values: dict[str, float]) -> None:
        """Log scalars of a step to all destinations."""
        self.metrics = {"step": step} | values
        try:
            self.folder.log(self.metrics)
            self._warned_of_metrics = False
        except ValueError as error:  # whether the training can go on is decided when a checkpoint is written
            if not self._warned_of_metrics:
                self.console.warn(f"{error}; metrics are kept in memory and written when that is possible again")
            self._warned_of_metrics = True
        for logger in self._loggers:
            logger.log(values, step)


def newest_checkpoint(folder: RunFolder, console: Console, schema: Any) -> Checkpoint | None:
    """The newest readable checkpoint of a folder, with a warning for each newer one that is damaged.

    Args:
        folder: the folder.
        console: for the warnings.
        schema: type of the state; see :meth:`RunFolder.newest`.
    """
    checkpoint, problems = folder.newest(schema)
    for problem in problems:
        console.warn(f"{problem}; resuming from an older one")
    return checkpoint
