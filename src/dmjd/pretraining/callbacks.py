"""What a run shows of itself: metrics, live line, images, online kNN, and a verdict at the end."""

import json
import math
from collections.abc import Iterable
from typing import Any, cast

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.encoders.registry import fresh_like
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.engine.console import Console
from dmjd.engine.loggers import Logger, open_loggers
from dmjd.engine.loop import Report
from dmjd.evaluation.frozen.online_knn import OnlineKnn
from dmjd.evaluation.frozen.protocol import evaluate_all
from dmjd.evaluation.results import read_result
from dmjd.evaluation.tables import results_table
from dmjd.figures.curves import save_curves_figure
from dmjd.figures.show import save_reconstruction_figure
from dmjd.model import MaskedImageModel
from dmjd.runs.build import open_test_data
from dmjd.runs.checkpoint import RunFolder
from dmjd.targets.base import Target

LOOKS = 10  # images and online kNN in a run, where no cadence is given

NUM_SHOWN = 3  # in the images a run makes of itself

VERDICT = ("knn", "linear")


class Monitor:
    """Watches a run from its first process.

    Args:
        config, model, source, folder: of the run. console: where messages go.

    Attributes:
        metrics: the last line written to ``metrics.jsonl``.
    """

    def __init__(
        self, config: PretrainConfig, model: MaskedImageModel, source: Source, folder: RunFolder, console: Console
    ) -> None:
        self.config, self.model, self.source, self.folder, self.console = config, model, source, folder, console
        self.metrics: dict[str, Any] = {}
        self._loggers: list[Logger] = []
        self._knn: OnlineKnn | None = None
        self._baselines: dict[str, float] = {}
        self._next_look = 0.0
        self._warned: set[str] = set()  # targets whose warning has been shown
        self._warnings: dict[str, str] = {}  # of targets, as the last line of metrics has it

    def open(self, step: int, share: float) -> None:
        """Before training: loggers, and images for online kNN where there are labels and a test set.

        Raises:
            ValueError: for labels that cannot be used, or a logger that is not installed.
        """
        settings = json.loads(self.config.to_json()) if self.config.wandb else None
        self._loggers = open_loggers(self.folder.path, step, settings)
        self._next_look = _look_after(share)
        test = self._test_source() if self.config.eval_every != 0 else None
        if test is not None:
            assert self.model.encoder.preprocess is not None
            self._knn = OnlineKnn(self.source, test, self.model.encoder.preprocess, self._device)

    def close(self) -> None:
        """After training: write what is left, end the live line."""
        for logger in self._loggers:
            logger.close()
        self.console.close()

    @property
    def _device(self) -> str:
        return next(self.model.parameters()).device.type

    def log(self, report: Report) -> None:
        """A line of metrics, where the step has one."""
        if report.scalars is None:
            return
        progress = report.state
        epoch = progress.images / len(self.source)
        self._write(report, {"epoch": epoch, "seconds": progress.seconds} | report.scalars)
        self._watch_targets(progress.step, report.scalars)
        self.console.progress(report.progress, progress.step, epoch, progress.seconds, report.scalars)

    def _watch_targets(self, step: int, scalars: dict[str, float]) -> None:
        """Say once what is wrong with a target, such as a collapse."""
        targets = cast(Iterable[Target], self.model.branch_targets.values())
        self._warnings = {t.name: text for t in targets if (text := t.warning(scalars)) is not None}
        for name in self._warnings.keys() - self._warned:
            self.console.warn(f"step {step}: {self._warnings[name]}")
        self._warned |= self._warnings.keys()

    def _write(self, report: Report, values: dict[str, float]) -> None:
        self.metrics = {"step": report.state.step} | values
        self.folder.log(self.metrics)
        for logger in self._loggers:
            logger.log(values, report.state.step)

    def due(self, report: Report) -> bool:
        """Whether it is time for :meth:`look`: every so many steps, or ten times a run."""
        every = self.config.eval_every
        if every is None:
            return report.progress >= self._next_look
        return every > 0 and report.state.step % every == 0

    def look(self, report: Report) -> None:
        """An image and, with labels, online kNN beside its baselines."""
        self._next_look = _look_after(report.progress)
        self._image(f"step-{report.state.step:09d}.png")
        if self._knn is None:
            return
        if not self._baselines:
            fresh = fresh_like(self.model.encoder, seed=self.config.seed).to(self._device)
            self._baselines = self._knn.baselines(fresh)
        values = {"knn_top1": self._knn(self.model.encoder)} | self._baselines
        self._write(report, values)
        shown = ", ".join(f"{name.removeprefix('knn_')} {100 * value:.1f}" for name, value in values.items())
        self.console.say(f"step {report.state.step}: online kNN, %: {shown}")

    def finish(self) -> dict[str, dict[str, Any]]:
        """Last image, curves, and where there are labels kNN and linear probe beside their baselines.

        Returns:
            task -> the dict of ``evaluation/<task>.json``; a finished run started again reads what is there.
        """
        path = self.folder.path
        for text in self._warnings.values():
            self.console.warn(f"at the end of the run: {text}")
        self._image("final.png")
        save_curves_figure(self.folder.metrics, path / "figures" / "curves.png")
        self.console.say(f"encoder: {path / ENCODER_FILE}   images: {path / 'figures'}")
        if not self.config.final_eval or self._test_source() is None:
            return {}
        known = {
            task: result
            for task in VERDICT
            if (result := read_result(path / "evaluation" / f"{task}.json", self.model.encoder))
        }
        results = known
        if len(known) < len(VERDICT):
            tasks: dict[str, dict[str, Any]] = {task: {} for task in VERDICT}
            results = evaluate_all(tasks, path, device=self._device, seed=self.config.seed)
        self.console.table(results_table(results))
        return results

    def _test_source(self) -> Source | None:
        """The labeled test set, where both sets have labels."""
        assert self.config.data is not None
        if self.source.labels is None:
            return None
        test = open_test_data(self.config, self.config.data, self.config.test_data)
        return test if test is not None and test.labels is not None else None

    def _image(self, name: str) -> None:
        """What the model sees, is asked for and answers, on some images of the set."""
        save_reconstruction_figure(self.model, self.source, self.folder.path / "figures" / name, num_images=NUM_SHOWN)


def _look_after(share: float) -> float:
    """The share of the run at which the next look is due, when they follow no step count."""
    return (math.floor(share * LOOKS + 1e-9) + 1) / LOOKS
