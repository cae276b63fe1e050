"""The figure of the sweeps in docs/evidence_paper.md, from results of convergence.py.

    python benchmarks/convergence/sweeps_figure.py \
      benchmarks/results/convergence_{ratio,views,targets}_vit_lite_2min.json --out docs/figures/sweeps.png

Results with the same starting recipe (``--override``) share a panel; the dashed line is the unchanged recipe.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from convergence_report import by_variant
from matplotlib.figure import Figure

from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI

ROW = 0.2  # inches


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--titles", nargs="+", help="of the panels, in the order of the recipes in the files")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    panels: dict[str, dict[str, dict[str, float]]] = {}  # recipe -> variant -> last probe
    for file in given.results:
        result = json.loads(file.read_text())
        panel = panels.setdefault(json.dumps(result["settings"]["override"], sort_keys=True), {})
        last = {name: own[0]["probes"][-1] for name, own in by_variant(result["runs"]).items() if own}
        panel.setdefault("unchanged", last.pop(result["baseline"]))
        panel |= last
    titles = given.titles or list(panels)
    if len(titles) != len(panels):
        raise SystemExit(f"error: {len(panels)} panels, {len(titles)} titles")
    save_figure(draw(dict(zip(titles, panels.values(), strict=True))), given.out)


def draw(panels: dict[str, dict[str, Any]]) -> Figure:
    """One row per variant, linear probe and kNN as dots, the unchanged recipe as a dashed line."""
    rows = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(4.8 * len(panels), ROW * rows + 1.2), dpi=DPI, layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (probe, name) in enumerate((("linear", "linear probe"), ("knn", "kNN"))):
            values = [100 * point[probe] for point in panel.values()]
            axes.plot(values, range(len(values)), "o", color=f"C{number}", markersize=5, label=name)
            axes.axvline(values[0], color=f"C{number}", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(panel)), list(panel))
        axes.invert_yaxis()
        axes.grid(axis="both", alpha=0.3)
        axes.set(xlabel="top-1 in % (held-out images)", title=title)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
