"""The first screen of a report: the facts of each run in a few words."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dmjd.encoders.model_card import time_text
from dmjd.reports.curves import LABEL_FREE, PANELS
from dmjd.reports.environment import machine_text
from dmjd.reports.facts import FINISHED, RunFacts
from dmjd.reports.scores import Bar
from dmjd.result_files import is_number

NOT_RECORDED = "not recorded"

_TITLES = {names[0]: (title, text) for title, (text, names) in PANELS.items()}


@dataclass(frozen=True)
class Measure:
    """A measure that needs no labels: its name, its last value, and what it tells."""

    name: str
    value: str
    help: str


@dataclass(frozen=True)
class Summary:
    """A run in a few words: ``facts`` as (label, text), in the same order for all runs."""

    name: str
    status: str
    finished: bool
    facts: list[tuple[str, str]]
    measures: list[Measure]
    conclusions: list[str]
    bars: list[tuple[str, Bar]]

    def score(self, task: str) -> str:
        """The score of an evaluation as text."""
        return next((bar.text for name, bar in self.bars if name == task and bar.kind == "result"), "-")

    def measure(self, name: str) -> str:
        """The value of a measure as text."""
        return next((one.value for one in self.measures if one.name == name), "-")


def summary_of(run: RunFacts, bars: list[tuple[str, Bar]]) -> Summary:
    """The summary of a run; ``bars`` are (task, score), also of its baselines."""
    training = run.training
    count = f"{training['num_images']:,} " if "num_images" in training else ""
    data = training.get("data")
    size = " x ".join(map(str, run.config.size))
    facts = [
        ("images", (f"{count}of {data}" if count else data) if data else count or NOT_RECORDED),
        ("encoder", f"{run.config.encoder}, {size} x {run.config.in_chans}"),
        ("recipe", _recipe(run)),
        ("trained", _duration(run)),
        ("machine", machine_text(run.environment) or NOT_RECORDED),
        ("speed", _speed(run)),
    ]
    if run.unreadable:
        facts.append(("unreadable images", f"{len(run.unreadable):,}"))
    return Summary(run.name, run.status, run.status == FINISHED, facts, _measures(run), run.conclusions, bars)


def _recipe(run: RunFacts) -> str:
    start = run.training.get("init")
    targets = run.config.branch_targets
    learned = ", ".join(f"{branch}: {target}" for branch, target in targets.items())
    teacher = f", teacher {Path(run.config.teacher).name}" if run.config.teacher else ""
    return f"{run.config.recipe} ({learned}{teacher}), from {start or 'random weights'}"


def _duration(run: RunFacts) -> str:
    training = run.training
    last: dict[str, Any] = run.metrics[-1] if run.metrics else {}
    steps, epochs = training.get("steps", last.get("step")), training.get("epochs", last.get("epoch"))
    seconds = training.get("seconds", last.get("seconds"))
    parts = [time_text(float(seconds))] if seconds is not None and is_number(seconds) else []
    parts += [f"{steps:,} steps"] if is_number(steps) else []
    parts += [f"{epochs:.3g} epochs"] if is_number(epochs) else []
    return ", ".join(parts) or NOT_RECORDED


def _speed(run: RunFacts) -> str:
    speeds = [line["images_per_s"] for line in run.metrics if is_number(line.get("images_per_s"))]
    return f"{median(speeds):,.0f} images/s" if speeds else NOT_RECORDED


def _measures(run: RunFacts) -> list[Measure]:
    values = {name: run.latest(name) for name in LABEL_FREE}
    return [
        Measure(_TITLES[name][0], f"{value:.3g}", _TITLES[name][1])
        for name, value in values.items()
        if value is not None and is_number(value)
    ]
