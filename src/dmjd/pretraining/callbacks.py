"""Monitoring of a pre-training run: figures, online kNN, warnings, unreadable images and the final evaluation."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from dmjd.config.pretrain import PretrainConfig
from dmjd.config.schedules import WSD
from dmjd.data.growth import Growth
from dmjd.data.recheck import Began, moved_reports, recheck
from dmjd.data.sources.base import Source
from dmjd.data.sources.mixture import MixtureSource
from dmjd.data.unreadable import Report as UnreadableReport
from dmjd.data.unreadable import UnreadableImages
from dmjd.encoders.headers import DEVICE_KEY, ENCODER_DIGEST_KEY, NUM_IMAGES_KEY, STABLE, WEIGHTS_KEY
from dmjd.encoders.stored import encoder_bytes, encoder_metadata, weights_hash_of
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.engine.console import Console
from dmjd.engine.device import device_text
from dmjd.engine.loggers import Logger, open_loggers
from dmjd.engine.loop import Report, TrainState
from dmjd.engine.processes import first_process_works, gather, num_processes, wait_for_first
from dmjd.evaluation.frozen.protocol import evaluate_frozen
from dmjd.evaluation.results import read_result
from dmjd.evaluation.tables import context_lines, results_table
from dmjd.figures.attempt import attempt_figure
from dmjd.figures.curves import save_curves_figure
from dmjd.figures.show import save_reconstruction_figure
from dmjd.files import digest_of, write_bytes, write_text
from dmjd.model import MaskedImageModel
from dmjd.pretraining.budget import SHARE, EvaluationBudget
from dmjd.pretraining.measures import DRIFT, KNN, NAMES, Measures
from dmjd.pretraining.pace import Pace, hardly_trained
from dmjd.pretraining.plan_final import SECONDS, estimate_final
from dmjd.pretraining.schedule import is_evaluation_step, short_warmup
from dmjd.reports.environment import write_environment
from dmjd.reports.report import report_training
from dmjd.runs.build import open_test_data
from dmjd.runs.callback import Callback
from dmjd.runs.checkpoint import Checkpoint, RunFolder
from dmjd.targets.base import Target
from dmjd.text import printable

NUM_EVALS = 10  # evaluations per run if no interval is given

NUM_IMAGES = 3  # in a reconstruction figure of a run

FINAL_TASKS = ("knn", "linear")

FIGURE_SECONDS = 2.0  # expected of the first figure

ENCODED = 0.5  # expected time to read and encode an image, twice because of the baseline, relative to training on it

MANY_IMAGES = 5000  # train and test, from which on the time of the final evaluation is told before it starts

MEASURED_IMAGES = 64  # for it

TOLD_SECONDS = 1.0  # evaluations that take less are not worth a message


class Monitor(Callback):
    """Evaluates a pre-training run at intervals and at its end, and keeps the record of unreadable images.

    Args:
        config, model, folder: those of the run.
        source: all images of the set, as the record of the run names them.
        held_out: those of them that the run does not train on; None: it trains on all.
        console: for messages.
        growth: the images that join the set.

    Attributes:
        unreadable: the unreadable images so far.
    """

    divisible = True

    def __init__(
        self,
        config: PretrainConfig,
        model: MaskedImageModel,
        source: Source,
        held_out: Source | None,
        folder: RunFolder,
        console: Console,
        growth: Growth | None = None,
    ) -> None:
        self._growth = growth
        self.config, self.model, self.source, self.folder, self.console = config, model, source, folder, console
        self._held_out = held_out
        self._num_trained = len(source) - (len(held_out) if held_out is not None else 0)
        self.unreadable = UnreadableImages()
        self._unshared: list[UnreadableReport] = []  # found by this process, and not yet known to the others
        self._began = Began.of(source)
        self._encoder_file = b""  # that belongs to the checkpoint which is being written
        self._budget = EvaluationBudget(limited=config.eval_every is None)
        self._measures: Measures | None = None
        self._pace: Pace | None = None
        self._told_of_cost = False
        self._before_cooldown = False  # whether the run goes on from there
        self._warned: set[str] = set()  # names of targets whose warning was shown
        self._warnings: dict[str, str] = {}  # by target, as of the last logged step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Check that the images are those of the checkpoint, and continue its record of unreadable ones."""
        self._before_cooldown = checkpoint.path.name == STABLE
        began, unreadable = began_with(checkpoint.state, self.config)
        joined = None if self._growth is None else self._growth.joined(self.source)
        known = recheck(self.source, began, unreadable, self.console.warn, joined)
        # Runs of former versions recorded no content: it is recorded from now on.
        self._began = Began(began.fingerprint, self._began.content) if began.content is None else began
        if not known.exceed(self.config.max_unreadable, self._num_images):  # else that ended the run; count again:
            self.unreadable = known  # a disk or folder that was gone may be back

    def after_restore(self) -> None:
        """Write the encoder again if its file is missing, damaged or not that of the checkpoint."""
        file, content = self.folder.path / ENCODER_FILE, encoder_bytes(self.model.encoder)
        if not file.is_file() or file.read_bytes() != content:
            write_bytes(file, content)
            if not self._before_cooldown:  # else it is as it should be: the run is prolonged
                self.console.say(f"{file} was missing or not that of the newest checkpoint: it is written again")

    def state(self) -> dict[str, Any]:
        """Encoder metadata, hash and the digest of its file, identity of the data, unreadable images, configuration."""
        encoder = self.model.encoder
        self._encoder_file = encoder_bytes(encoder)
        return {
            "encoder": encoder_metadata(encoder),
            WEIGHTS_KEY: weights_hash_of(self._encoder_file),
            ENCODER_DIGEST_KEY: digest_of(self._encoder_file),
            "data": self._began.fingerprint,
            NUM_IMAGES_KEY: len(self.source),
            DEVICE_KEY: device_text(self._device),
            "content": list((self._began.content or {}).items()),
            "bad": self.unreadable.reports,
            **({} if self._growth is None else {"joined": self._growth.count}),
            "config": json.loads(self.config.to_json()),
        }

    def start(self, step: int, progress: float) -> Sequence[Logger]:
        """Record the machine, prepare online kNN if there are labels and a test set, and open the loggers.

        Raises:
            ValueError: if labels cannot be used, or a logger is not installed.
        """
        write_environment(self.folder.path, next(self.model.parameters()).device, num_processes())
        if step == 0 and self.config.minutes is not None and self.config.batch_size is not None:
            parts = num_processes() * self.config.accumulate
            batch_size = min(self.config.batch_size, self._num_trained)
            self._pace = Pace(self.config.minutes, batch_size, parts, self.config.compile)
        wandb_config = json.loads(self.config.to_json()) if self.config.wandb else None
        loggers = open_loggers(self.folder.path, step, wandb_config, self.console.warn)
        if self.config.eval_every != 0:
            self._measures = Measures(self.config, self.model, self.folder, self.console, self._budget)
            self._measures.start(self.source, self._held_out, self._test_source, fresh=step == 0)
        return loggers

    def after_step(self, report: Report) -> None:
        """Show the warning of each target once, e.g. of a collapse, and advice if run or warm-up have too few steps."""
        if self._pace is not None and (advice := self._pace.advice(report, self._budget.spent)) is not None:
            self.console.warn(advice)
        if (cut := short_warmup(self.config, report)) is not None:
            self.console.warn(cut)
        if report.scalars is None:
            return
        targets = cast(Iterable[Target], self.model.branch_targets.values())
        self._warnings = {t.name: text for t in targets if (text := t.warning(report.scalars)) is not None}
        for name in self._warnings.keys() - self._warned:
            self.console.warn(f"step {report.state.step}: {self._warnings[name]}")
        self._warned |= self._warnings.keys()

    def is_due(self, report: Report) -> bool:
        """Every ``eval_every`` steps, or ten times per run (with wsd, by its growth), and at the end.

        Whether there is time is decided by :meth:`evaluate`, in the first process.
        """
        every = self.config.eval_every
        if report.progress >= 1.0:
            return every != 0
        if every is None:
            if self.config.schedule == WSD:
                return is_evaluation_step(report.state.step)
            return report.progress >= _next_evaluation(report.before)
        return every > 0 and report.state.step % every == 0

    def evaluate(self, report: Report) -> dict[str, float]:
        """Save a reconstruction figure, and measure what :class:`Measures` has.

        Without ``eval_every`` an evaluation is left out if all of them would take more than a tenth of the training
        time so far. At the end :meth:`finish` follows, with the last figure and, if there are labels, kNN.
        """
        state, final = report.state, report.progress >= 1.0
        estimate = FIGURE_SECONDS + ENCODED * self.images_evaluated * state.seconds / max(1, state.images)
        if not self._budget.allows(state.seconds, estimate):
            if final:
                return self._measure(state.step, "at the end", (DRIFT,))
            if self.images_evaluated:  # a figure that is left out is not missed
                self._tell_cost(f"step {state.step}: no evaluation, which would take", estimate)
            return {}
        with self._budget.measured():
            if final:
                left_out = (KNN,) if self.config.final_eval else ()  # to be measured on all images
                return self._measure(state.step, "at the end", [name for name in NAMES if name not in left_out])
            attempt_figure(lambda: self._save_figure(f"step-{state.step:09d}.png"), self.console)
            scores = self._measure(state.step, f"step {state.step}")
        self._tell_cost("an evaluation takes", estimate)
        return scores

    @property
    def evaluation_seconds(self) -> float:
        """Duration of the last evaluation without what is done once; 0 before the first one."""
        return self._budget.last or 0.0

    @property
    def images_evaluated(self) -> int:
        """How many images the first evaluation encodes."""
        return self._measures.num_images if self._measures is not None else 0

    def _measure(self, step: int, when: str, names: Collection[str] = NAMES) -> dict[str, float]:
        if self._measures is None:
            return {}
        scores = self._measures(step, when, names)
        self.count_unreadable(self._measures.unreadable)
        return scores

    def _tell_cost(self, begin: str, estimate: float) -> None:
        """Say once how long an evaluation takes, and when there is one."""
        seconds, every = self._budget.last or estimate, self.config.eval_every
        if self._told_of_cost or (self._budget.last is not None and seconds < TOLD_SECONDS):
            return
        self._told_of_cost = True
        when = f"there is one every {every} steps (--eval-every)"
        if every is None:
            when = f"at most {100 * SHARE:.0f} % of the time goes to evaluations (--eval-every N: one every N steps)"
        self.console.say(f"{begin} about {max(1, round(seconds))} s; {when}")

    def after_save(self, final: bool) -> None:
        """Write the encoder to the run folder."""
        write_bytes(self.folder.path / ENCODER_FILE, self._encoder_file)
        self._encoder_file = b""

    def finish(self, state: TrainState) -> dict[str, dict[str, Any]]:
        """If there are labels, run kNN and linear probe with their baselines; then save the last figures.

        Only the first process does so; the others wait for it.

        Args:
            state: of the finished loop.

        Returns:
            Task -> content of ``evaluation/<task>.json``. Existing results of the same encoder are reused.
        """
        if (little := hardly_trained(state.step, state.images / self._num_trained)) is not None:
            self.console.warn(little)
        if not self.folder.owner:
            wait_for_first()
            return {}
        with first_process_works():
            results = self._finish()
            if self.config.report:
                report_training(self.folder.path, self.model, self.source, state.seconds, self.console)
        return results

    def _finish(self) -> dict[str, dict[str, Any]]:
        path = self.folder.path
        for text in self._warnings.values():
            self.console.warn(f"at the end of the run: {text}")
        try:
            results = self._final_results()
        finally:
            curves = path / "figures" / "curves.png"
            attempt_figure(lambda: self._save_figure("final.png"), self.console)
            attempt_figure(lambda: save_curves_figure(self.folder.metrics, curves), self.console)
            self.console.say(f"encoder: {path / ENCODER_FILE}   images: {path / 'figures'}")
        if results:
            self.console.table(results_table(results), *context_lines(results, path))
        return results

    def _final_results(self) -> dict[str, dict[str, Any]]:
        """Task -> result of the final evaluation; those of the same encoder are read."""
        if not self.config.final_eval or self._test_source is None:
            return {}
        path, encoder = self.folder.path, self.model.encoder
        found = {task: read_result(path / "evaluation" / f"{task}.json", encoder) for task in FINAL_TASKS}
        results = {task: result for task, result in found.items() if result is not None}
        if len(results) < len(FINAL_TASKS):
            tasks: dict[str, dict[str, Any]] = {task: {} for task in FINAL_TASKS}
            seed, test = self.config.seed, self._test_source
            names = " and ".join(FINAL_TASKS)
            about = self._time_of_final(test)
            self.console.say(f"final evaluation: {names}, with their baselines{about} (--no-final-eval leaves it out)")
            results = evaluate_frozen(tasks, encoder, self.source, test, folder=path, seed=seed)
        return results

    def _time_of_final(self, test: Source) -> str:
        """How long the evaluation of many images will take; of few ones it is over in less time than is measured."""
        if len(self.source) + len(test) < MANY_IMAGES:
            return ""
        try:
            seconds = estimate_final(self.model.encoder, self.source, test, SECONDS / MEASURED_IMAGES)
        except Exception:  # unreadable images, for example: the evaluation deals with them
            return ""
        return f", about {max(1, round(seconds / 60))} min" if seconds >= 90 else f", about {max(1, round(seconds))} s"

    def count_unreadable(self, reports: Iterable[UnreadableReport]) -> None:
        """Record (name, reason) of unreadable images, and warn about each once.

        Raises:
            ValueError: if there are more than the configuration tolerates. Several processes find that together, in
                :meth:`share`.
        """
        self._unshared += self._note_unreadable(reports)
        if num_processes() == 1:
            self._check_unreadable()

    def share(self) -> None:
        """Let all processes know the unreadable images of each.

        Raises:
            ValueError: in all of them, if there are more than the configuration tolerates.
        """
        for reports in gather(self._unshared):
            self._note_unreadable(reports)
        self._unshared = []
        self._check_unreadable()

    def _note_unreadable(self, reports: Iterable[UnreadableReport]) -> list[UnreadableReport]:
        """Record unreadable images and warn about the new ones, which are returned."""
        new = self.unreadable.add(reports)
        for name, reason in new:
            self.console.warn(f"unreadable, replaced by another image: {name}: {reason}")
        return new

    @property
    def _num_images(self) -> int:
        """Of the set, with those that have joined it."""
        return len(self.source) + (self._growth.count if self._growth is not None else 0)

    def _check_unreadable(self) -> None:
        cure = self.unreadable.cure(self.source.removable)
        self.unreadable.check(self.config.max_unreadable, self._num_images, cure)
        if isinstance(self.source, MixtureSource):
            self.source.check_remains(self.unreadable.reports)

    def report_unreadable(self) -> tuple[UnreadableReport, ...]:
        """Write ``unreadable.txt``, if there were any; returns (name, reason) of each so far."""
        reports = self.unreadable.reports
        if reports:
            file = self.folder.path / "unreadable.txt"
            if self.folder.owner:
                write_text(file, "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in reports))
            self.console.warn(f"{len(reports)} unreadable image(s) were replaced; see {file}")
        return tuple(reports)

    @property
    def _device(self) -> str:
        return next(self.model.parameters()).device.type

    @cached_property
    def _test_source(self) -> Source | None:
        """The labeled test set, if both sets have labels."""
        assert self.config.data is not None
        if self.source.labels is None:
            return None
        test = open_test_data(self.config, self.config.data, self.config.test_data)
        if test is not None and test.labels is not None and test.split == "val":
            self.console.say(f"kNN is measured on {test.title}, the validation part: there is no test part")
        return test if test is not None and test.labels is not None else None

    def _save_figure(self, name: str) -> None:
        """Save a figure of masked input, targets and predictions of a few images."""
        save_reconstruction_figure(self.model, self.source, self.folder.path / "figures" / name, num_images=NUM_IMAGES)


def began_with(state: Mapping[str, Any], config: PretrainConfig) -> tuple[Began, list[UnreadableReport]]:
    """The images of a checkpoint, and its unreadable ones, by the names they have at the configured path."""
    content, former = state.get("content"), state["config"].get("data")
    reports = [(name, reason) for name, reason in state["bad"]]
    if former is not None and config.data is not None:
        reports = moved_reports(reports, former, config.data)
    return Began(state["data"], dict(content) if content is not None else None), reports


def _next_evaluation(progress: float) -> float:
    """The next progress at which an evaluation is due, if the interval is not given in steps."""
    return (math.floor(progress * NUM_EVALS + 1e-9) + 1) / NUM_EVALS
