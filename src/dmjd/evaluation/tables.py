"""Results as tables for the console."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dmjd.engine.console import literal
from dmjd.result_files import is_number

ROWS = {"result": "this encoder", "random_init": "random initialization", "raw_pixels": "raw pixels"}


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Top-1 accuracies in percent: a row for the encoder and each baseline, a column for each task.

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
    for name, label in ROWS.items():
        if any(name in result for result in results.values()):
            table.add_row(label, *(_cell(result.get(name)) for result in results.values()))
    return table


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
