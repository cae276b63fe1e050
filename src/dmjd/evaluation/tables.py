"""Results as tables for the console, with what they were measured on and how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from dmjd.engine.console import literal
from dmjd.evaluation.registry import TASKS
from dmjd.result_files import EVALUATION, is_number

TOO_SHORT_KEY = "too_short"  # in a result: why its training is too short to judge the encoder by

POOLED_BY_TIMM = "pooled by timm"  # the only feature of a model of timm

MANY_MINUTES = 120  # more are shown as hours

ROWS = {"result": "this encoder", "random_init": "random initialization", "raw_pixels": "raw pixels"}


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Top-1 accuracies in percent: a row for the encoder and each baseline, a column for each task.

    With trained baselines, a last column says what the trainings took.

    A task without a top-1 accuracy gets a row for each score, and columns for the encoder and its baseline.

    Args:
        results: task -> what :func:`dmjd.evaluate` returned.
    """
    for task, result in results.items():
        if "top1" not in result["result"]:
            return _scores_table(task, result)
    table = Table("top-1 accuracy, %")
    for task, result in results.items():
        seeds = len(result["result"].get("per_seed", ()))
        table.add_column(f"{task}, {seeds} seeds" if seeds else task, justify="right")
    trained = {name: one for result in results.values() for name, one in result.get("baselines", {}).items()}
    if trained:
        table.add_column("training", overflow="fold")
    for name, label in ROWS.items():
        if any(name in result for result in results.values()):
            cells = [_cell(result.get(name)) for result in results.values()]
            cost = training_text(next(iter(results.values())).get("training", {})) if name == "result" else "-"
            table.add_row(label, *cells, *([cost] if trained else []))
        for other in trained if name == "result" else ():
            found = (result.get("baselines", {}).get(other, {}) for result in results.values())
            cells = [_cell(one.get("result")) for one in found]
            table.add_row(literal(other), *cells, training_text(trained[other]["training"]))
    return table


def training_text(training: Mapping[str, Any]) -> str:
    """What a training took: "12 min, CPU, 2 threads; 96,000 images seen"; "-" if it is unknown."""
    minutes, device, images = (training.get(name) for name in ("minutes", "device", "images"))
    if minutes is None or not is_number(minutes):
        return "-"
    text = f"{minutes:.1f} min" if minutes < MANY_MINUTES else f"{minutes / 60:.1f} h"
    text += f", {device}" if device is not None else ""
    return text + (f"; {images:,} images seen" if isinstance(images, int) else "")


def context_lines(results: Mapping[str, Mapping[str, Any]], folder: Path | None) -> list[str]:
    """Lines below a table of results: data, labels and chance level; seeds; protocols; where the JSON files are.

    Args:
        results: task -> what :func:`dmjd.evaluate` returned; all on the same data.
        folder: the folder that holds ``evaluation/``; None if nothing was written.
    """
    first = next(iter(results.values()))
    seeds = len(first["result"].get("per_seed", ()))
    lines = [line] if (line := _data_line(first.get("data", {}))) else []
    if seeds:
        lines.append(f"± is the standard deviation over {seeds} seeds")
    elif "seed" in first:
        lines.append(f"one seed ({first['seed']})")
    lines += [f"{task}: {text}" for task, result in results.items() if (text := _protocol(task, result))]
    lines += [line for task, result in results.items() if (line := _pooled_line(task, result))]
    lines += [f"{task}: {result[TOO_SHORT_KEY]}" for task, result in results.items() if result.get(TOO_SHORT_KEY)]
    if folder is None:
        return [*lines, "JSON: none was written; --out FOLDER says where it goes"]
    return [*lines, f"JSON: {', '.join(str(folder / EVALUATION / f'{task}.json') for task in results)}"]


def _data_line(data: Mapping[str, Any]) -> str:
    """What a result says about its data; files of former versions say less."""
    sets = (("trained on", "train", "num_train"), ("tested on", "test", "num_test"))
    parts = [f"{verb} {data[count]:,} images of {data[name]}" for verb, name, count in sets if count in data]
    if "split" in data and (data["test"] == data["train"] or data["split"] == "val"):
        parts[-1] += f" ({data['split']})"
    classes = data.get("classes")
    if classes is not None:
        parts.append(f"{classes if isinstance(classes, int) else len(classes)} classes")
    if (labels := labels_text(data)) is not None:
        parts.append(f"{labels} labels a class")
    if is_number(data.get("chance")):
        parts.append(f"chance {100 * data['chance']:.1f} % (always the most frequent class)")
    return ", ".join(parts)


def labels_text(data: Mapping[str, Any]) -> str | None:
    """The labels of a class that a result was measured with: "10", or "3 to 25"; None if it does not say so."""
    if (counts := data.get("labels_per_class")) is None:
        return None
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} to {counts[1]:,}"


def _pooled_line(task: str, result: Mapping[str, Any]) -> str:
    """Which baselines of a sweep had a single feature to choose from."""
    baselines = result.get("baselines", {}).items()
    names = [name for name, one in baselines if _first_seed(one["result"]).get("features") == POOLED_BY_TIMM]
    if not names:
        return ""
    verb = "has one feature, the one that timm pools" if len(names) == 1 else "have one feature, the one timm pools"
    return f"{task}: {', '.join(names)} {verb}; layers and poolings are searched for encoders of ours only"


def _first_seed(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores of the first seed, where there are several."""
    per_seed = scores.get("per_seed")
    return per_seed[0] if per_seed else scores


def _protocol(task: str, result: Mapping[str, Any]) -> str:
    if task not in TASKS:
        return ""
    settings = dict(result.get("configuration", {}))
    settings["steps"] = result["result"].get("steps", settings.get("steps"))
    return TASKS[task].protocol.format_map(settings)


def _scores_table(task: str, result: Mapping[str, Any]) -> Table:
    table = Table(f"{task}, %")
    rows = {name: _flat(result[name]) for name in ROWS if name in result}
    for name in rows:
        table.add_column(ROWS[name], justify="right")
    for score in rows["result"]:
        values = [scores.get(score) for scores in rows.values()]
        table.add_row(literal(score), *("-" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def _flat(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Scores by name, nested ones as "group name"; other values are left out."""
    flat: dict[str, float | None] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {key}": v for key, v in _flat(value).items()}
        elif value is None or isinstance(value, float):
            flat[name] = value
    return flat


def _cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None or not is_number(scores.get("top1")):
        return "-"
    deviation = f" ± {100 * scores['top1_std']:.1f}" if is_number(scores.get("top1_std")) else ""
    return f"{100 * scores['top1']:.1f}{deviation}"
