"""Results of evaluations, beside their baselines and those of other runs."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmjd.evaluation.compare import PARTS, Comparison, compare_results
from dmjd.evaluation.tables import context_lines
from dmjd.reports.facts import RunFacts


@dataclass(frozen=True)
class Bar:
    """A score in percent, with its standard deviation if there are several seeds; ``kind`` is a part of a result."""

    run: str
    label: str
    kind: str
    value: float
    std: float | None
    note: str = ""

    @property
    def text(self) -> str:
        """The score as text."""
        return f"{self.value:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")

    @property
    def low(self) -> float:
        """Where the error bar begins, in percent of the width."""
        return max(0.0, self.value - (self.std or 0.0))

    @property
    def high(self) -> float:
        """Where the error bar ends."""
        return min(100.0, self.value + (self.std or 0.0))


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one evaluation, and lines on data and protocol."""

    task: str
    metric: str
    bars: list[Bar]
    lines: list[str]


def compared(runs: Sequence[RunFacts]) -> Comparison | None:
    """The comparison of the runs that have results; None if there are none.

    Damaged results are left out: the problems of their run name them. Results that were measured before a run went on
    have a note in it instead of a warning.
    """
    with_results = [run for run in runs if run.results]
    if not with_results:
        return None
    with warnings.catch_warnings(action="ignore"):
        return compare_results({Path(os.path.abspath(run.path)): run.results for run in with_results})


def score_tables(runs: Sequence[RunFacts], comparison: Comparison | None) -> list[ScoreTable]:
    """A table for each evaluation: a bar for each run and each of its baselines."""
    if comparison is None:
        return []
    by_name = dict(zip(comparison.runs, [run for run in runs if run.results], strict=True))
    tables = []
    for (task, metric), scores in comparison.scores.items():
        notes, bars = comparison.notes.get((task, metric), {}), []
        for name, parts in scores.items():
            for part, score in parts.items():
                label = "this encoder" if part == "result" else PARTS.get(part, part)
                std = None if score.std is None else 100 * score.std
                note = notes.get(name, "") if part == "result" else ""
                bars.append(Bar(by_name[name].name, label, part, 100 * score.value, std, note))
        tables.append(ScoreTable(task, metric, bars, _lines(task, [by_name[name] for name in scores])))
    return tables


def _lines(task: str, runs: Sequence[RunFacts]) -> list[str]:
    """What results were measured on and how, said once if it is the same for all runs."""
    found: dict[str, None] = {}
    for run in runs:
        result: dict[str, Any] = run.results[task]
        found |= dict.fromkeys(line for line in context_lines({task: result}, None) if not line.startswith("JSON:"))
    return list(found)
