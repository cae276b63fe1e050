"""``dmjd report``: a run, or several side by side, as one HTML file that needs nothing else."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmjd import __version__
from dmjd.config.checks import Bounds, check_int, check_out, check_path, check_seed, check_text
from dmjd.config.evaluation import LabeledConfig
from dmjd.config.fields import DEVICES
from dmjd.data.sources.base import Source
from dmjd.engine.console import Console
from dmjd.evaluation.compare import short_names
from dmjd.files import check_writable, make_folder, write_text
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.reports.clock import Clock
from dmjd.reports.curves import curve_panels
from dmjd.reports.embedding_map import map_data
from dmjd.reports.facts import FINISHED, RunFacts, read_run
from dmjd.reports.images import (
    NO_TIME,
    Gallery,
    Shown,
    attempt,
    attention_shown,
    gallery,
    image_file,
    method_figures,
    newest_reconstruction,
    reason_of,
)
from dmjd.reports.page import MISSING_EXTRA, check_extra, render
from dmjd.reports.relations import Confusion, neighbor_confusion
from dmjd.reports.sample import Sample, draw_sample
from dmjd.reports.scores import compared, score_tables
from dmjd.reports.settings import commands_of, settings_of
from dmjd.reports.summary import summary_of
from dmjd.reports.trained import InTraining, Trained
from dmjd.result_files import EVALUATION, REPORT_FILE

MAX_RUNS, MAX_IMAGES = 50, 200_000

_SHARE, _MOST_SECONDS = 0.08, 60.0  # of the training time, for the report at the end of a run

_FEWEST_SECONDS = 0.5  # with less, nothing is computed for it

_MOST_AT_END = 1000  # images

_UNREADABLE_SHOWN = 200


@own_defaults()
def report(
    *runs: str | Path,
    out: str | Path = REPORT_FILE,
    data: str | Path | None = None,
    split: str = "train",
    labels: str | None = None,
    num_images: int = 1000,
    device: str = "auto",
    seed: int = 0,
    **lists: Any,
) -> Path:
    """Write a report on one or several runs: one HTML file, which loads nothing from elsewhere.

    Curves, scores and settings are those of all runs; figures, the map of embeddings, neighbors and near duplicates
    those of the first one. What cannot be made, for example because the images moved, is left out, with the reason.

    Args:
        runs: run folders. A run may still be training.
        out: the file, ending in .html; an existing one is replaced.
        data: the images; None: those of the first run.
        split: "train", "val" or "test", of data that has several parts.
        labels: source of class labels: "none", "folder" or "column"; None: that of the run.
        num_images: images in the map of embeddings and among which neighbors are searched; 0: none.
        device: "auto", "cpu" or "cuda".
        seed: seed of the images.
        lists: ``label_column``, ``path_column``, ``root`` and ``max_unreadable`` of a list, as in ``open_source``;
            ``cache_dir`` and ``cache_gb`` of a remote set.

    Returns:
        The file.

    Raises:
        ValueError: if a folder is not a run, the file cannot be written, or an optional package is missing.
    """
    if not runs:
        raise ValueError("give at least one run folder to report on")
    check_int("runs", len(runs), Bounds(most=MAX_RUNS))
    seed, num_images = check_seed(seed, ge=0), check_int("num_images", num_images, Bounds(ge=0, most=MAX_IMAGES))
    given = LabeledConfig.of_images(data, split, labels, lists)
    out, device = _checked_out(out), check_text("device", device, DEVICES)
    check_extra()
    folders = list(dict.fromkeys(Path(os.path.abspath(check_path("run", run))) for run in runs))
    facts = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    trained = Trained(folders[0], device, **given)
    make_folder(out.parent)
    write_text(out, _page(facts, trained, num_images, Clock(), seed))
    return out


def _checked_out(out: str | Path) -> Path:
    """The path of a file that can be written."""
    out = check_out("out", out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out}: end it in .html")
    check_writable(out)
    return out


def time_for_report(training: float) -> float:
    """The seconds that the computed parts of a report at the end of a training of some seconds may take."""
    return min(_MOST_SECONDS, _SHARE * training)


def report_training(run: Path, model: MaskedImageModel, source: Source, seconds: float, console: Console) -> None:
    """Write ``report.html`` at the end of a training, within a bounded time; a failure is one line.

    Args:
        run: the run folder.
        model: the trained model.
        source: its images.
        seconds: training time. The computed parts take at most about a tenth of it, and a minute.
        console: for messages.
    """
    limit = time_for_report(seconds)
    try:
        check_extra()
        facts = read_run(run, run.name, finished=True)
        clock = Clock(limit if limit >= _FEWEST_SECONDS else 0.0)
        write_text(run / REPORT_FILE, _page([facts], InTraining(run, model, source), _MOST_AT_END, clock, 0))
        console.say(f"report: {run / REPORT_FILE}")
    except Exception as error:  # of any library that takes part: the training is saved already
        reason = reason_of(error)
        if reason == MISSING_EXTRA:
            console.say(f"no {REPORT_FILE}: {reason}")
        else:
            console.warn(f"{REPORT_FILE} could not be made: {reason}")


def _page(runs: Sequence[RunFacts], trained: Trained, num_images: int, clock: Clock, seed: int) -> str:
    """The HTML of a report."""
    problems = dict(runs[0].problems)
    shown = _figures(runs[0], trained, clock, seed, problems)
    sample = _sample(trained, num_images, clock, seed, problems)
    return page_of(runs, shown, sample, problems, clock, seed)


def page_of(
    runs: Sequence[RunFacts],
    shown: Mapping[str, Shown],
    sample: Sample | None,
    problems: Mapping[str, str],
    clock: Clock,
    seed: int = 0,
) -> str:
    """The HTML of a report on runs, with figures and a sample of the images of the first one.

    Args:
        runs: the runs.
        shown: name -> figure.
        sample: the images; None: without map and neighbors.
        problems: part -> why it is missing.
        clock: the time that the map may take.
        seed: seed of the map.
    """
    first, problems = runs[0], dict(problems)
    damaged = [run.problems["scores"] for run in runs[1:] if run.results and "scores" in run.problems]
    if damaged:
        problems["scores"] = "; ".join(([problems["scores"]] if "scores" in problems else []) + damaged)
    embedding, rows, confusion = _inside(sample, clock, seed, problems)
    comparison = compared(runs)
    tables = score_tables(runs, comparison)
    bars = [(table.task, bar) for table in tables for bar in table.bars]
    summaries = [summary_of(run, [(task, bar) for task, bar in bars if bar.run == run.name]) for run in runs]
    return render(
        {
            "version": __version__,
            "runs": runs,
            "unfinished": [run for run in runs if run.status != FINISHED],
            "summaries": summaries,
            "measures": list(dict.fromkeys(one.name for summary in summaries for one in summary.measures)),
            "shown": shown,
            "confusions": _confusion_files(first),
            "problems": problems,
            "tables": tables,
            "differences": {} if comparison is None else comparison.differences,
            "compared_runs": [] if comparison is None else comparison.runs,
            "gallery": rows,
            "settings": settings_of(first.config),
            "commands": commands_of(first),
            "environment": first.environment,
            "unreadable": first.unreadable[:_UNREADABLE_SHOWN],
            "num_unreadable": len(first.unreadable),
            "data": {
                "runs": [run.name for run in runs],
                "panels": curve_panels(runs),
                "map": embedding,
                "confusion": _confusion_data(confusion, sample),
            },
        }
    )


def _figures(run: RunFacts, trained: Trained, clock: Clock, seed: int, problems: dict[str, str]) -> dict[str, Shown]:
    shown, reasons = method_figures(trained, newest_reconstruction(run.path), clock, seed)
    problems |= reasons
    attempt("attention", lambda: attention_shown(trained, seed), shown, problems, clock)
    return shown


def _sample(trained: Trained, count: int, clock: Clock, seed: int, problems: dict[str, str]) -> Sample | None:
    if count == 0:
        problems["sample"] = "no images were requested (--num-images 0)"
        return None
    if clock.left <= 0:
        problems["sample"] = NO_TIME
        return None
    encoding = Clock(clock.left / 2 if clock.limited else None)
    try:
        return draw_sample(trained.encoder, trained.source, count, encoding, seed=seed)
    except Exception as error:  # the images or the weights cannot be read: the rest is of use without them
        problems["sample"] = reason_of(error)
        return None


def _inside(
    sample: Sample | None, clock: Clock, seed: int, problems: dict[str, str]
) -> tuple[dict[str, Any] | None, Gallery | None, Confusion | None]:
    """The map of a sample, rows of its images, and the confusion matrix of its nearest neighbors."""
    if sample is None:
        return None, None, None
    embedding = rows = confusion = None
    try:
        rows, found = gallery(sample)
        confusion = None if sample.labels is None else neighbor_confusion(found, sample.labels)
        embedding = map_data(sample, clock, seed)
    except Exception as error:  # as above
        problems["sample"] = reason_of(error)
    return embedding, rows, confusion


def _confusion_data(confusion: Confusion | None, sample: Sample | None) -> dict[str, Any] | None:
    if confusion is None or sample is None:
        return None
    return {
        "classes": [sample.source.classes[label] for label in confusion.classes],
        "percent": [[round(float(value), 1) for value in row] for row in confusion.percent],
        "accuracy": confusion.accuracy,
        "k": confusion.k,
        "count": confusion.count,
    }


def _confusion_files(run: RunFacts) -> list[Shown]:
    """Confusion matrices that evaluations drew."""
    shown = []
    for file in sorted((run.path / EVALUATION).glob("*/**/confusion*.png")):
        task = file.relative_to(run.path / EVALUATION).parts[0]
        try:
            shown.append(image_file(file, f"Confusion matrix of {task}", task))
        except ValueError:
            continue
    return shown
