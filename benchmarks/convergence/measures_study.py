"""Which measure without labels tells the quality of an encoder? Rank correlations with the linear probe.

    python benchmarks/convergence/measures_study.py benchmarks/results/convergence_*_measures.json \
      --out benchmarks/results/measures.json --figure docs/figures/measures.png

Reads results of ``convergence.py``, whose probes hold the measures. For each set of images:

- within a run: Spearman's rank correlation over its probes, without that of the weights it began with, and what is lost
  in linear probe if the checkpoint with the best value of the measure is taken instead of the one with the best probe;
- across runs: the same correlation over the last probes of all runs, which differ in recipe, rate, length and seed. A
  loss is compared among runs of one recipe only, which is why it has no such value.

A measure is worth something within a run only if it does better than the time, which rises with the probe in every run
that learns: the first row takes the last checkpoint.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI

# measure -> sign: 1 if more should be better
MEASURES = {"step": 1, "held_out_loss": -1, "effective_rank": 1, "feature_std": 1, "alpha_req": -1, "neighbors_kept": 1}

PER_RECIPE = ("step", "held_out_loss")

LEAST_PROBES = 4  # of a correlation within a run

WORDS = {
    "step": "the time",
    "held_out_loss": "held-out loss",
    "effective_rank": "effective rank",
    "feature_std": "feature deviation",
    "alpha_req": "alpha-ReQ",
    "neighbors_kept": "neighbors kept",
}


def main() -> None:
    """Read, compare, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of convergence.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    given = parser.parse_args()
    sets = runs_by_data(given.results)
    found = {data: {name: compare(runs, name) for name in MEASURES} for data, runs in sets.items()}
    given.out.write_text(json.dumps({"runs": {d: len(r) for d, r in sets.items()}, "measures": found}, indent=1) + "\n")
    save_figure(draw(sets), given.figure)
    for data, rows in found.items():
        print(f"{data}: {len(sets[data])} runs\n\n{table(rows)}\n")


def runs_by_data(files: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Name of the images -> runs with measures; a run that several files hold counts once."""
    sets: dict[str, dict[str, Any]] = defaultdict(dict)
    for file in files:
        result = json.loads(file.read_text())
        for run in result["runs"]:
            if "effective_rank" in run["probes"][-1] and not run["diverged"]:
                sets[result["settings"]["data"]][run["key"]] = run
    return {data: list(runs.values()) for data, runs in sets.items()}


def compare(runs: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """How well a measure tells the linear probe, within runs and across them; see the top of the file."""
    sign, within, lost = MEASURES[name], [], []
    for run in runs:
        points = [(sign * p[name], p["linear"]) for p in run["probes"] if name in p and p["step"]]
        if len(points) >= LEAST_PROBES:
            within.append(rank_correlation(points))
            lost.append(max(linear for _, linear in points) - max(points)[1])
    last = [(sign * run["probes"][-1][name], run["probes"][-1]["linear"]) for run in runs]
    return {
        "within": statistics.mean(within) if within else None,
        "within_positive": statistics.mean(rho > 0 for rho in within) if within else None,
        "lost": statistics.mean(lost) if lost else None,
        "across": rank_correlation(last) if name not in PER_RECIPE and len(last) >= LEAST_PROBES else None,
    }


def rank_correlation(points: list[tuple[float, float]]) -> float:
    """Spearman's rank correlation of pairs; 0 if one of both does not vary."""
    rho = float(spearmanr(*zip(*points, strict=True)).statistic)
    return rho if rho == rho else 0.0


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """Correlations, and points of linear probe that are lost, as Markdown."""
    lines = [
        "| measure | within a run | runs with a positive one | points lost | across runs |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        texts = [
            "" if row[key] is None else form.format(row[key])
            for key, form in (("within", "{:.2f}"), ("within_positive", "{:.0%}"))
        ]
        texts.append("" if row["lost"] is None else f"{100 * row['lost']:.1f}")
        texts.append("" if row["across"] is None else f"{row['across']:.2f}")
        lines.append(f"| {WORDS[name]} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(sets: dict[str, list[dict[str, Any]]]) -> Figure:
    """A row for each set of images, a column for each measure; a line for each run, a dot at its end."""
    shown = [name for name in MEASURES if name != "step"]
    figure = Figure(figsize=(3.2 * len(shown), 3.0 * len(sets)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(sets), len(shown), squeeze=False, sharey="row")
    for row, (data, runs) in zip(grid, sets.items(), strict=True):
        recipes = {name: f"C{i % 10}" for i, name in enumerate(sorted({run["variant"] for run in runs}))}
        for axes, name in zip(row, shown, strict=True):
            for run in runs:
                points = [(p[name], 100 * p["linear"]) for p in run["probes"] if name in p]
                axes.plot(*zip(*points, strict=True), color=recipes[run["variant"]], linewidth=0.8, alpha=0.6)
                axes.plot(*points[-1], "o", color=recipes[run["variant"]], markersize=4)
            axes.set(xlabel=WORDS[name])
            axes.grid(alpha=0.3)
        row[0].set(ylabel=f"{data}: linear probe, %")
    return figure


if __name__ == "__main__":
    main()
