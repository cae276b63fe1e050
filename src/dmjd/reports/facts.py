"""What a run folder tells about a run without its weights: settings, metrics, results, unreadable images."""

import shlex
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.headers import CHECKPOINTS, FINAL, read_headers
from dmjd.encoders.training_facts import TrainingFacts, read_facts
from dmjd.evaluation.comparability import newest_weights
from dmjd.files import try_lock
from dmjd.reports.environment import read_environment
from dmjd.result_files import BASELINES, EVALUATION, read_evaluation
from dmjd.runs.build import read_config
from dmjd.runs.health import warnings_of
from dmjd.runs.metrics import read_metrics

FINISHED, TRAINING, STOPPED, NOT_SAVED = "finished", "still training", "stopped before its end", "nothing saved yet"


@dataclass
class RunFacts:
    """A run.

    Attributes:
        path: the folder.
        name: distinguishes it from the other runs of a report.
        config: its settings.
        status: finished, still training, stopped before its end, or nothing saved yet.
        training: size and duration of its training.
        environment: machine and versions; empty if not recorded.
        metrics: lines of ``metrics.jsonl``.
        results: task -> content of ``evaluation/<task>.json``.
        unreadable: (name, reason) of unreadable images.
        conclusions: sentences on its quality.
        problems: part of the report -> why it cannot be made.
    """

    path: Path
    name: str
    config: PretrainConfig
    status: str
    training: TrainingFacts
    environment: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def latest(self, name: str) -> float | None:
        """The last value of a scalar; None if it was never logged."""
        return next((line[name] for line in reversed(self.metrics) if name in line), None)


def read_run(run: Path, name: str, *, finished: bool = False) -> RunFacts:
    """Read a run folder.

    Args:
        run: the folder.
        name: its name in the report.
        finished: whether the training is over, though this process still holds its lock.

    Raises:
        ValueError: if it is not a run folder, or its configuration is damaged.
    """
    with warnings.catch_warnings(action="ignore"):  # of a configuration taken from a checkpoint: the report shows it
        config = read_config(run)
    training = read_facts(run, newest_weights(run) or "")
    status = FINISHED if finished else _status(run)
    facts = RunFacts(run, name, config, status, training, read_environment(run))
    _add_metrics(facts)
    _add_results(facts)
    _add_unreadable(facts)
    facts.conclusions = [*_against_baselines(facts), *map(_sentence, warnings_of(config, facts.metrics).values())]
    return facts


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _status(run: Path) -> str:
    if _is_locked(run / ".lock"):
        return TRAINING
    headers, _ = read_headers(run / CHECKPOINTS)
    if not headers:
        return NOT_SAVED
    return FINISHED if headers[0].path.name == FINAL else STOPPED


def _is_locked(lock: Path) -> bool:
    """Whether another process holds the lock of a run folder; False where that cannot be found out."""
    if not lock.is_file():
        return False
    try:
        held = try_lock(lock)
    except (OSError, ValueError):
        return False
    if held is None:
        return True
    held.close()
    return False


def _add_metrics(facts: RunFacts) -> None:
    try:
        facts.metrics = read_metrics(facts.path / "metrics.jsonl")
    except ValueError as error:
        facts.problems["curves"] = str(error)
    if not facts.metrics:
        facts.problems.setdefault("curves", "metrics.jsonl holds no line yet")


def _add_results(facts: RunFacts) -> None:
    damaged = []
    for file in sorted((facts.path / EVALUATION).glob("*.json")):
        if file.name != BASELINES:
            try:
                facts.results[file.stem] = read_evaluation(file)
            except (OSError, ValueError) as error:
                damaged.append(str(error))
    if damaged:
        facts.problems["scores"] = "; ".join(damaged)
    elif not facts.results:
        run = shlex.quote(str(facts.path))
        facts.problems["scores"] = f"no evaluation yet: dmjd evaluate knn {run} --labels folder makes one"


def _add_unreadable(facts: RunFacts) -> None:
    file = facts.path / "unreadable.txt"
    if not file.is_file():
        return
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        facts.problems["unreadable"] = f"{file} cannot be read: {error.strerror}"
        return
    for line in lines:
        name, _, reason = line.partition("\t")
        facts.unreadable.append((name, reason))


def _against_baselines(facts: RunFacts) -> list[str]:
    """One sentence for each result of the newest weights: how much better than its baselines."""
    names = {"random_init": "random weights", "raw_pixels": "raw pixels"}
    sentences = []
    for task, found in facts.training.get("evaluations", {}).items():
        own = found["scores"].get("result")
        differences = [
            f"{100 * abs(own - other):.1f} points {'above' if own >= other else 'below'} {names[part]}"
            for part, other in found["scores"].items()
            if part in names and other is not None and own is not None
        ]
        if differences and own is not None:
            sentences.append(f"{task} {100 * own:.1f} %: {' and '.join(differences)}.")
    return sentences
