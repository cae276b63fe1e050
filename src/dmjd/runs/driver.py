"""The driver of every training: restore, log, evaluate at intervals, save at intervals, final checkpoint.

Whatever ends a training, its state is saved, unless an error left the weights in the middle of an update.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dmjd.encoders.headers import COOLING_KEY
from dmjd.encoders.parts import Part
from dmjd.engine.busy_cores import warn_of_busy_cores
from dmjd.engine.console import LIVE_SECONDS, Console
from dmjd.engine.cooldown_signal import CooldownSignal
from dmjd.engine.loggers import Logger
from dmjd.engine.loop import Engine, Hook, NonFiniteLoss, Report
from dmjd.engine.processes import (
    LostProcessError,
    check_same,
    explain_loss,
    first_process_works,
    from_first,
    gather,
    wait_for_first,
)
from dmjd.engine.stop_signal import StopNow, StopSignal
from dmjd.runs.callback import Callback
from dmjd.runs.checkpoint import FINAL, Checkpoint, RunFolder, one_line
from dmjd.runs.little_memory import run_within_memory
from dmjd.runs.weights import Weights

LINES = 20  # of metrics.jsonl, in a run too slow or short for one every few steps: written as they are shown

UNEVALUATED = "unevaluated"  # in the state of a checkpoint: its step is to be evaluated first


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
        branch: prepares a finished encoder of the newest checkpoint, in a folder of its own; returns what trains it,
            which returns whether it did, or was stopped by a signal. Called in all processes.
        asked: what asks for a branch; several processes look at it when they share.
        in_parts: whether each process writes its part of a checkpoint, if the model is sharded.

    Attributes:
        metrics: the scalars of the last logged step.
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
    branch: Callable[[], Callable[[], bool]] | None = None
    asked: CooldownSignal = field(default_factory=CooldownSignal)
    in_parts: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = Weights(self.model, self.engine.optimizer, self.engine.whole, self.in_parts)
        self._loggers: Sequence[Logger] = ()
        self._restored_final = False
        self._complete: int | None = self.engine.state.step  # last step with its callback; None: in it
        self._unevaluated: dict[str, Any] | None = None  # the callback's state before a due evaluation
        self._warned_of_metrics = False
        self._saved: int | None = None  # step of the last checkpoint
        self._cooling = False  # whether a step of the cooldown was done
        self._recorded = self.engine.progress  # at the last line of metrics of a logged or shown step

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Continue from a checkpoint, if there is one; a final one may hold no optimizer state, only the result.

        Metrics of later steps, which will be repeated, are deleted, and files that do not fit the checkpoint, e.g.
        after a kill between two writes, are written again.

        Raises:
            ValueError: if the checkpoint belongs to other data or to another model, or other processes have another.
        """
        if checkpoint is not None:
            try:
                self.callback.restore(checkpoint)
                self.engine.load_state_dict(checkpoint.state)
                self._weights.load(checkpoint)
            except (RuntimeError, TypeError, KeyError) as error:
                raise ValueError(f"{checkpoint.path} does not fit this training: {one_line(error)}") from None
            self._weights.gather(with_optimizer=False)
        cure = "the folder of the run must be on a file system that all machines share, or be copied to each of them"
        check_same(self.engine.state.step, "starts at step", cure)
        if self.folder.owner:
            if damaged := self.folder.cut_metrics(self.engine.state.step):
                self.console.warn(f"{self.folder.metrics}: {damaged} damaged line(s) are left out")
            if checkpoint is not None:
                self.callback.after_restore()
        if checkpoint is not None:
            self._restored_final = checkpoint.path.name == FINAL
            self._cooling = bool(checkpoint.state.get(COOLING_KEY))
            self._complete, self._recorded = self.engine.state.step, self.engine.progress
            checkpoint.tensors.clear()  # they would stay in memory for the whole run
            if checkpoint.state.get(UNEVALUATED):
                self._unevaluated = self.callback.state() if self.folder.owner else {}

    def run(self) -> bool:
        """Train to the end, or until a signal requests a stop; the state is saved either way.

        After an error in loading data, in the model or in a hook the state of the last step is saved too, and the
        error is raised.

        Returns:
            Whether the training is finished.

        Raises:
            LostProcessError: if another process of the run ended or does not answer.
        """
        if self._restored_final and self.engine.progress >= 1.0:
            return True
        warn_of_busy_cores(self.engine.fabric.device, self.console)
        batches = self.batches(self.engine.state.step)
        patience = 2.0 if self.engine.fabric.world_size == 1 else 10.0  # several processes agree on a step
        hooks: list[Hook] = [self._note_due]
        try:
            if self.folder.owner:  # one process logs, evaluates and saves
                self._loggers = self.callback.start(self.engine.state.step, self.engine.progress)
                hooks = [self._after_step, self._log]
            hooks.insert(0, self._gather_if_due)
            with StopSignal(patience, self._heard) as stop, closing(batches):
                hooks += [self._share, lambda report: self._evaluate(report, stop)]
                if self.folder.owner or self._weights.in_parts:
                    hooks.append(self._save)
                if self.folder.owner:
                    hooks += self.hooks
                hooks += [lambda report: self._branch(report, stop), lambda report: self._weights.release()]
                finished = self._train(batches, hooks, stop)
        finally:
            for logger in self._loggers:
                logger.close()
            self.console.close()
        if finished and stop.requested:  # too late to stop the training: it is meant for what follows
            os.kill(os.getpid(), stop.requested)
        if not finished and self._saved == self.engine.state.step:
            self._say("stopped at step {}, checkpoint saved; the same command resumes from there")
        return finished

    def _train(self, batches: Generator[Any, None, None], hooks: Sequence[Hook], stop: StopSignal) -> bool:
        """Train and save; returns whether the training is finished."""
        try:
            if self._unevaluated is not None:
                self._evaluate(Report(self.engine.state, self.engine.progress, None), stop)
            self._weights.release()
            show_every = LIVE_SECONDS if self.folder.owner else None
            finished = run_within_memory(
                self.engine,
                batches,
                lambda parts: self.engine.run(self._announced(parts), hooks, stop, show_every),
                self.console,
                again=self.batches if self.callback.divisible else None,
            )
        except StopNow:
            finished = False
            if self._ends_alone(self.engine.computing):
                return False
        except NonFiniteLoss:
            raise
        except Exception as error:
            loss = explain_loss(error) if self.engine.fabric.world_size > 1 else None
            if loss is None or not stop.requested or self.engine.updating:
                self._save_after_error()
                if loss is not None:
                    raise LostProcessError(loss) from error
                raise
            self.console.warn(loss)  # as requested, it stopped, but could not wait for this process
            finished = False
            if self._ends_alone():
                return False
        self._weights.gather()
        if self.folder.owner:
            self._complete_step()
        if self.folder.owner or self._weights.in_parts:
            self.save(final=finished)
        return finished

    def _announced(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; the first one is shown as the begin of a step that may be long."""
        first = [next(batches)]  # starts the loader's processes, which is done without the thread of a live line
        self.console.wait("first step ...")
        yield first.pop()
        yield from batches

    def _save_after_error(self) -> None:
        """Save the last step if its weights are complete. What prevents it must not hide the error itself."""
        if not self.folder.owner or self.engine.updating or self._complete is None or not self.engine.state.step:
            return
        if self._ends_alone():
            return
        with suppress(Exception):
            self._complete_step()
            self.save()
            self._say("an error ended the run after step {}, whose state is saved")

    def _complete_step(self) -> None:
        """Call the callback for the last step, if the loop ended between step and callback."""
        if self._complete is not None and self._complete < self.engine.state.step:
            self._after_step(Report(self.engine.state, self.engine.progress, None, self.engine.before))

    def _say(self, text: str) -> None:
        prefix = f"{self.name}: " if self.name else ""
        self.console.say(prefix + text.format(self.engine.state.step))

    def _after_step(self, report: Report) -> None:
        self._complete = None
        self._cooling |= self._has_cooldown_begun(report.before)
        self.callback.after_step(report)
        self._complete = report.state.step
        self._note_due(report)

    def _note_due(self, report: Report) -> None:
        if self.callback.is_due(report):
            self._unevaluated = self.callback.state() if self.folder.owner else {}

    def _gather_if_due(self, report: Report) -> None:
        """Put a sharded model together for the hooks of a step that need it."""
        saves = self._saves_at(report)
        if saves or self.callback.is_due(report):
            self._weights.gather(with_optimizer=saves)

    def _ends_alone(self, alone: bool = True) -> bool:
        """Whether this process cannot save, because the others, which hold parts of the model, may not be there."""
        if not (self._weights.need_all_processes and alone):
            return False
        self.console.warn(
            f"stopped in step {self.engine.state.step + 1}: with --strategy fsdp one process alone cannot save it; the "
            "same command resumes from the last checkpoint"
        )
        return True

    def save(self, final: bool = False) -> None:
        """Write a checkpoint, unless a step was not finite: the last good one stays.

        One in parts is written by all processes, others by the first one.
        """
        self.engine.check_finite()
        step, stable = self.engine.state.step, self._has_cooldown_begun(self.engine.progress) and not self._cooling
        file = self.folder.file(step, final, stable)
        self._weights.save(file, lambda tensors, parts: self._write(tensors, parts, final, stable))
        self._saved = step

    def _write(self, tensors: dict[str, Tensor], parts: list[Part], final: bool, stable: bool) -> None:
        """Write the file of a checkpoint, in the first process."""
        state = self.engine.state_dict() | self.callback.state()
        if self._unevaluated is not None:  # a stop or error came before the end of the step's evaluation
            state |= self._unevaluated | {UNEVALUATED: True}
        if self._cooling:
            state[COOLING_KEY] = True
        tensors = self.callback.tensors(tensors, final)
        self.folder.save(self.engine.state.step, tensors, state, final, stable, parts)
        self.callback.after_save(final)

    def _heard(self, number: int) -> None:
        """Say that a signal was received, while the step goes on."""
        if number == signal.SIGINT:
            self.console.say("stopping after this step, which is saved; Ctrl-C again ends at once, without saving")
        else:
            self.console.say(f"{signal.Signals(number).name}: stopping after this step, which is saved")

    def _log(self, report: Report) -> None:
        scalars = report.live if report.scalars is None else report.scalars
        if scalars is None:
            return
        state, epoch = report.state, report.state.images / self.num_images
        if report.scalars is not None or state.step == 1 or report.progress - self._recorded >= 1 / LINES:
            self._record(state.step, {"epoch": epoch, "seconds": state.seconds} | scalars)
            self._recorded = report.progress
        self.console.progress(report.progress, state.step, epoch, state.seconds, scalars)

    def _share(self, report: Report) -> None:
        if self._shares_at(report):
            self.callback.share()

    def _shares_at(self, report: Report) -> bool:
        """At steps that are logged or saved."""
        return report.scalars is not None or self._saves_at(report)

    def _evaluate(self, report: Report, stop: StopSignal) -> None:
        """Evaluate in the first process if it is due, while the others wait. A stop interrupts it; it is done again."""
        if self._unevaluated is None:
            return
        scores: dict[str, float] = {}
        if self.folder.owner:
            self.engine.check_finite()
            self.console.close()  # an evaluation has lines of its own, and may start processes
            with first_process_works(), stop.interruptible():
                scores = self.callback.evaluate(report)
        elif not wait_for_first():
            raise StopNow
        self._unevaluated = None
        if scores:
            self._record(report.state.step, scores)

    def _has_cooldown_begun(self, progress: float) -> bool:
        """Whether a step that begins at ``progress`` belongs to a cooldown."""
        return self.engine.cooldown is not None and self.engine.cooldown.has_begun(progress)

    def _saves_at(self, report: Report) -> bool:
        """At intervals, and before the first step of a cooldown."""
        begins = self._has_cooldown_begun(report.progress) and not self._has_cooldown_begun(report.before)
        return (report.state.step % self.checkpoint_every == 0 or begins) and report.progress < 1.0

    def _save(self, report: Report) -> None:
        if self._saves_at(report):
            self.save()

    def _branch(self, report: Report, stop: StopSignal) -> None:
        """Make a finished encoder of the state so far if that was asked for. The run goes on, whatever comes of it.

        An error in the training of a branch ends a run of several processes: the others may not have had it.
        """
        if self.branch is None or not self._is_asked(report):
            return
        try:
            self._check_branch(report)
            self._weights.gather()
            self.save() if self._weights.in_parts else from_first(self.save)
            train = self.branch()
        except Exception as error:
            self.console.warn(f"no branch, the run goes on: {error}")
            return
        self.console.close()
        try:
            with stop.interruptible():
                finished = train()
        except Exception as error:
            if self.engine.fabric.world_size > 1:
                raise
            self.console.warn(f"no branch, the run goes on: {error}")
            return
        if finished:
            self._say("the run goes on from step {}")
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # what stopped the branch was meant for the run

    def _is_asked(self, report: Report) -> bool:
        """Whether a branch was asked for in any process."""
        if self.engine.fabric.world_size == 1:
            return self.asked.take()
        return self._shares_at(report) and any(gather(self.asked.take()))

    def _check_branch(self, report: Report) -> None:
        """Raise ValueError if no branch can be made now."""
        if self.engine.cooldown is None:
            raise ValueError("a cosine schedule has no cooldown of its own (--schedule wsd)")
        if self.engine.state.step <= self.engine.warmup_steps:
            raise ValueError(f"step {report.state.step} belongs to the warm-up of {self.engine.warmup_steps} steps")
        if self._has_cooldown_begun(report.progress):
            raise ValueError("the run is in its own cooldown")

    def _record(self, step: int, values: dict[str, float]) -> None:
        """Log scalars of a step to all destinations."""
        line = {"step": step} | values
        self.metrics = (self.metrics if self.metrics.get("step") == step else {}) | line
        try:
            self.folder.log(line)
            self._warned_of_metrics = False
        except ValueError as error:  # whether the training can go on is decided when a checkpoint is written
            if not self._warned_of_metrics:
                self.console.warn(f"{error}; metrics are kept in memory and written when that is possible again")
            self._warned_of_metrics = True
        for logger in self._loggers:
            logger.log(values, step)
