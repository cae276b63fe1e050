"""Runs side by side: the results of their evaluations, and the settings in which they differ."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from dmjd.checked_json import read_json
from dmjd.config.checks import check_path
from dmjd.config.evaluation import EvaluationConfig
from dmjd.config.pretrain import DURATIONS, PretrainConfig
from dmjd.encoders.training_facts import training_cost
from dmjd.engine.console import literal
from dmjd.evaluation.comparability import EARLIER, data_texts, newest_weights, other_data, redo_command
from dmjd.evaluation.tables import training_text
from dmjd.figures.grid import figure_path, save_figure
from dmjd.figures.panels import dpi_of
from dmjd.result_files import BASELINES, headline, is_number, read_evaluation
from dmjd.runs.checkpoint import CONFIG_FILE
from dmjd.text import drawable
from dmjd.warning import DMJDWarning

# part of evaluation/<task>.json -> its label
PARTS = {"result": "result", "random_init": "random init", "raw_pixels": "raw pixels"}

_MARKERS = {"random_init": ("|", "#222222"), "raw_pixels": ("x", "#888888")}

# They may change on resume because files move. Other images, or another teacher, are then refused.
_MAY_MOVE = {"data", "teacher"}

_LINES = ("--", ":", "-.")  # of trained baselines

# Settings that do not change the weights.
_IRRELEVANT = {"out"} | {f.name for f in dataclasses.fields(PretrainConfig) if f.metadata["resume"]}.difference(
    DURATIONS, _MAY_MOVE
)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score, with its standard deviation if there are several seeds."""

    value: float
    std: float | None = None

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.value:.1f}" + (f" ± {100 * self.std:.1f}" if self.std is not None else "")


@dataclasses.dataclass(frozen=True)
class BaselineScore:
    """The score of a trained baseline, the runs beside which it was measured, and what its training took, in words."""

    score: Score
    runs: tuple[str, ...]
    training: str = "-"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Evaluations of several runs.

    Attributes:
        runs: names of the runs: as many last parts of their paths as are needed to distinguish them.
        scores: (task, metric) -> run -> part of :data:`PARTS` -> score. Runs and parts without a score are absent.
        differences: setting -> its value in each run, for settings that differ. Settings of an evaluation are named
            ``task.setting``.
        tested: (task, metric) -> run -> test set and labels of the result, in words.
        notes: (task, metric) -> run -> why its result does not count in a ranking: it was measured before the run went
            on, or on other data or labels than the first run's. Runs without such a reason are absent.
        baselines: (task, metric) -> name -> score of a trained baseline. Where runs have other scores for the same
            name, it is followed by that of the run.
        training: run -> what its training took, in words.
    """

    runs: list[str]
    scores: dict[tuple[str, str], dict[str, dict[str, Score]]]
    differences: dict[str, list[str]]
    tested: dict[tuple[str, str], dict[str, tuple[str, str]]] = dataclasses.field(default_factory=dict)
    notes: dict[tuple[str, str], dict[str, str]] = dataclasses.field(default_factory=dict)
    baselines: dict[tuple[str, str], dict[str, BaselineScore]] = dataclasses.field(default_factory=dict)
    training: dict[str, str] = dataclasses.field(default_factory=dict)


def compare(*runs: str | Path, out: str | Path | None = None) -> Comparison:
    """Read ``evaluation/*.json`` of run folders and compare them.

    Args:
        runs: run folders.
        out: file for a bar chart; None: no chart.

    Raises:
        ValueError: if there are no runs, a folder has no evaluations, a file cannot be read, or the ending of ``out``
            is not an image format.
    """
    if not runs:
        raise ValueError("give at least one run folder to compare")
    if out is not None:
        out = figure_path(out)
    folders = list(dict.fromkeys(Path(os.path.abspath(check_path("run", run))) for run in runs))
    comparison = compare_results({folder: _evaluations(folder) for folder in folders})
    if out is not None:
        save_figure(comparison_figure(comparison), out)
    return comparison


def compare_results(results: Mapping[Path, Mapping[str, Mapping[str, Any]]]) -> Comparison:
    """Compare results that were read: run folder -> task -> content of ``evaluation/<task>.json``."""
    folders, evaluations = list(results), list(results.values())
    names = short_names(folders)
    scores: dict[tuple[str, str], dict[str, dict[str, Score]]] = {}
    contents: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for name, tasks in zip(names, evaluations, strict=True):
        for task, content in tasks.items():
            metric = headline(content["result"])
            assert metric is not None
            parts = {part: _score(content.get(part), metric) for part in PARTS}
            present = {part: score for part, score in parts.items() if score is not None}
            scores.setdefault((task, metric), {})[name] = present
            contents.setdefault((task, metric), {})[name] = content
    earlier = {name: _earlier(folder, tasks) for name, folder, tasks in zip(names, folders, evaluations, strict=True)}
    tested = {key: {name: data_texts(one) for name, one in found.items()} for key, found in contents.items()}
    notes = {key: _notes(key[0], found, earlier) for key, found in contents.items()}
    settings = [_settings(folder, tasks) for folder, tasks in zip(folders, evaluations, strict=True)]
    return Comparison(
        names,
        dict(sorted(scores.items())),
        _differences(settings, evaluations),
        tested,
        notes,
        {key: found for key, some in contents.items() if (found := _baselines(key[1], some))},
        {name: _training_text(folder) for name, folder in zip(names, folders, strict=True)},
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """As many last parts of different paths as are needed to distinguish them."""
    count = 1
    while len({folder.parts[-count:] for folder in folders}) < len(folders):
        count += 1
    return ["/".join(folder.parts[-count:]) for folder in folders]


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Results in a run folder: task -> content of its file."""
    files = sorted(file for file in (run / "evaluation").glob("*.json") if file.name != BASELINES)
    if not files:
        raise ValueError(f"{run} holds no evaluation/*.json: make one with dmjd evaluate knn {run}")
    evaluations = {}
    for file in files:
        evaluations[file.stem] = read_evaluation(file)
    return evaluations


def _earlier(run: Path, evaluations: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Tasks that were measured before the run was trained further; with a warning that says how to measure again."""
    weights = newest_weights(run)
    if weights is None:
        return set()
    tasks = {task for task, content in evaluations.items() if content.get("encoder") not in (weights, None)}
    for task in sorted(tasks):
        redo = redo_command(task, run, evaluations[task])
        warnings.warn(f"{run}: {task} was {EARLIER}; measure again: {redo}", DMJDWarning, stacklevel=3)
    return tasks


def _notes(task: str, contents: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, set[str]]) -> dict[str, str]:
    """Run -> why its result does not count in a ranking."""
    first = next(iter(contents.values()))
    notes = {}
    for run, content in contents.items():
        reasons = (EARLIER if task in earlier[run] else None, other_data(first, content))
        if text := "; ".join(reason for reason in reasons if reason is not None):
            notes[run] = text
    return notes


def _baselines(metric: str, contents: Mapping[str, Mapping[str, Any]]) -> dict[str, BaselineScore]:
    """Name -> score of the trained baselines in results of a task."""
    groups: dict[str, dict[str, BaselineScore]] = {}  # name -> key of what was measured -> score
    for run, content in contents.items():
        for name, one in content.get("baselines", {}).items():
            if (score := _score(one["result"], metric)) is None:
                continue
            measured = [one["weights"], score.value, content.get("data", {}).get("fingerprint")]
            group, key = groups.setdefault(name, {}), json.dumps(measured)
            runs = (*group[key].runs, run) if key in group else (run,)
            group[key] = BaselineScore(score, runs, training_text(one["training"]))
    return {
        name if len(group) == 1 else f"{name} ({', '.join(one.runs)})": one
        for name, group in groups.items()
        for one in group.values()
    }


def _training_text(run: Path) -> str:
    """What the training of the newest weights of a run took."""
    weights = newest_weights(run)
    return "-" if weights is None else training_text(training_cost(run, weights))


def _score(part: Mapping[str, Any] | None, metric: str) -> Score | None:
    if not part or not is_number(part.get(metric)):
        return None
    deviation = part.get(f"{metric}_std")
    return Score(float(part[metric]), float(deviation) if deviation is not None and is_number(deviation) else None)


def _settings(run: Path, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All settings of a run and of its evaluations, under their current names."""
    file = run / CONFIG_FILE
    try:
        config = read_json(file, dict[str, Any]) if file.exists() else {}
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file} is not a run's configuration ({reason}): dmjd pretrain writes it again") from None
    config = PretrainConfig.from_former(config)
    settings = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    for task, content in tasks.items():
        own = EvaluationConfig.from_former(content.get("configuration", {}))
        own |= {"seed": content.get("seed"), "data": content.get("data", {}).get("fingerprint")}
        settings |= {f"{task}.{name}": value for name, value in own.items()}
    return settings


def _differences(
    settings: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Settings with more than one value. Settings of a task are compared among the runs that have its result."""
    differences = {}
    for name in dict.fromkeys(name for one in settings for name in one):
        task = name.split(".")[0]
        compared = [one for one, tasks in zip(settings, evaluations, strict=True) if "." not in name or task in tasks]
        if len({json.dumps(one.get(name)) for one in compared}) > 1:
            differences[name] = [_text(one[name]) if name in one else "-" for one in settings]
    return differences


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table of scores in percent for each task, with a row per run, and a table of settings that differ, if any do.

    Results with a note stand below the others, with the note under the name of the run.
    """
    tables = []
    for (task, metric), runs in comparison.scores.items():
        notes, tested = comparison.notes.get((task, metric), {}), comparison.tested.get((task, metric), {})
        baselines = comparison.baselines.get((task, metric), {})
        table = Table(title=literal(f"{task}: {metric}, %"), title_justify="left")
        table.add_column("run", overflow="fold")
        for label in PARTS.values():
            table.add_column(label, justify="right")
        if baselines:
            table.add_column("training", overflow="fold")
        table.add_column("test set, labels", overflow="fold")
        for run in sorted(runs, key=lambda run: run in notes):
            cells = [literal(str(runs[run].get(part, "-"))) for part in PARTS]
            cells += [literal(comparison.training.get(run, "-"))] if baselines else []
            names = [run, f"({notes[run]})"] if run in notes else [run]
            table.add_row(
                Text("\n").join(map(literal, names)), *cells, Text("\n").join(map(literal, tested.get(run, ("-",))))
            )
        for name, one in baselines.items():
            where = Text("\n").join(map(literal, tested.get(one.runs[0], ("-",))))
            table.add_row(literal(f"baseline {name}"), literal(str(one.score)), "-", "-", literal(one.training), where)
        tables.append(table)
    if not comparison.differences:
        return tables
    settings = Table(title="settings that differ", title_justify="left")
    for label in ("setting", *comparison.runs):
        settings.add_column(literal(label), overflow="fold")
    for setting, values in comparison.differences.items():
        settings.add_row(literal(setting), *map(literal, values))
    return [*tables, settings]


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw a panel per task: a bar for each run, markers for its baselines, and lines for trained baselines."""
    tasks = list(comparison.scores)
    height = 0.36 * len(comparison.runs) + 0.9
    size = (7.5, height * len(tasks) + 0.4)
    figure = Figure(figsize=size, dpi=dpi_of(size), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    names = list(dict.fromkeys(name for found in comparison.baselines.values() for name in found))
    for axes, (task, metric) in zip(panels, tasks, strict=True):
        _bars(axes, comparison.runs, comparison.scores[task, metric], comparison.notes.get((task, metric), {}))
        for name, one in comparison.baselines.get((task, metric), {}).items():
            style = _LINES[names.index(name) % len(_LINES)]
            axes.axvline(100 * one.score.value, linestyle=style, color="#555555", linewidth=1.2, label=drawable(name))
        axes.set_title(drawable(f"{task}: {metric}, %"), fontsize=9, loc="left")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def _bars(axes: Axes, runs: Sequence[str], scores: Mapping[str, Mapping[str, Score]], notes: Mapping[str, str]) -> None:
    """Draw runs from top to bottom. A run without a result has an empty row, so that all panels use the same colors.

    Results with a note are pale, and the note stands below the name.
    """
    for row, run in enumerate(runs):
        parts = scores.get(run, {})
        label, end = "-", 0.0  # text to the right of the bar and its markers
        if "result" in parts:
            score = parts["result"]
            error = 100 * score.std if score.std is not None else None
            pale = 0.35 if run in notes else 1.0
            axes.barh(row, 100 * score.value, 0.62, color=f"C{row % 10}", alpha=pale, xerr=error)
            label, end = str(score), max(score.value + (score.std or 0), *(s.value for s in parts.values()))
        axes.annotate(label, (100 * end, row), (7, 0), textcoords="offset points", va="center", fontsize=8)
        for part, (marker, color) in _MARKERS.items():
            if part in parts:
                style: dict[str, Any] = {"marker": marker, "color": color, "linestyle": "", "markeredgewidth": 2.0}
                axes.plot([100 * parts[part].value], [row], label=PARTS[part], markersize=11, **style)
    names = [drawable(run) + ("\n" + notes[run].replace("; ", "\n") if run in notes else "") for run in runs]
    axes.set_yticks(range(len(runs)), names, fontsize=8)
    axes.set(ylim=(len(runs) - 0.5, -0.5))
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
