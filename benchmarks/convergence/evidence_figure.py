"""Linear probe against minutes and against images, from results of convergence.py: the figures of docs/evidence.md.

    python benchmarks/convergence/evidence_figure.py benchmarks/results/convergence_{main,beyond}_vit_lite_6min.json \
      --variants mae maskfeat dmjd --out docs/figures/evidence.png
"""

import argparse
import json
from pathlib import Path

from convergence_report import Run, by_variant, curve
from matplotlib.figure import Figure

from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI

AXES = {"minutes": "minutes of training", "images": "images seen, thousands"}


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files; a run that occurs in several counts once")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--labels", nargs="+", help="of the variants in the figure; default their names")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = {run["key"]: run for file in given.results for run in json.loads(file.read_text())["runs"]}
    groups = {name: own for name, own in by_variant(list(runs.values())).items() if own}
    if missing := [name for name in given.variants if name not in groups]:
        raise SystemExit(f"error: no run of {', '.join(missing)}; there are: {', '.join(groups)}")
    labels = dict(zip(given.variants, given.labels or given.variants, strict=True))
    save_figure(draw({label: groups[name] for name, label in labels.items()}), given.out)


def draw(groups: dict[str, list[Run]]) -> Figure:
    """One line per variant; bands from the lowest to the highest seed."""
    figure = Figure(figsize=(9.5, 3.6), dpi=DPI, layout="constrained")
    for axes, (x, title) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        scale = 1e-3 if x == "images" else 1.0
        for label, own in groups.items():
            points, *ys = curve(own, x, "linear")
            xs = [scale * point for point in points]
            mean, low, high = ([100 * v for v in values] for values in ys)
            (line,) = axes.plot(xs, mean, marker=".", linewidth=1.4, label=label)
            axes.fill_between(xs, low, high, alpha=0.15, color=line.get_color())
        axes.grid(alpha=0.3)
        axes.set(xlabel=title)
    first = figure.axes[0]
    first.set(ylabel="linear probe, top-1 in %\n(held-out images)")
    first.legend(fontsize=8, loc="best")
    return figure


if __name__ == "__main__":
    main()
