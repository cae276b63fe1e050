"""From which share of a step on does it pay to mask an image several times? Gain of K views over one in equal time.

    python benchmarks/convergence/sharing_figure.py benchmarks/results/convergence_sharing_*.json \
      --out docs/figures/sharing.png

Reads results of ``convergence.py sharing`` for several values of ``--once-share``, and draws the difference in linear
probe to the baseline, which has one view. Error bars are the standard deviation over seeds of both, added in squares.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI

WORDS = {
    "two_views": "2 disjoint views",
    "four_views": "4 disjoint views",
    "two_independent": "2 independent views",
    "four_independent": "4 independent views",
    "one_view_32": "1 view of 32 images",
    "one_view_16": "1 view of 16 images",
    "two_views_32": "2 disjoint views of 32 images",
    "four_views_16": "4 disjoint views of 16 images",
}


def main() -> None:
    """Read, draw, write; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of convergence.py sharing")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    results = sorted((json.loads(file.read_text()) for file in given.results), key=share_of)
    print(table(results))
    save_figure(draw(results), given.out)


def share_of(result: dict[str, Any]) -> float:
    """The part of the baseline's step that an image costs once."""
    return float(result["settings"]["once_share"])


def gain(result: dict[str, Any], name: str) -> tuple[float, float]:
    """Points of linear probe on held-out images that a variant has more than the baseline; standard deviation."""
    own, base = (result["summary"][each]["held_out"]["linear"] for each in (name, result["baseline"]))
    return 100 * (own["mean"] - base["mean"]), 100 * math.hypot(own.get("std") or 0.0, base.get("std") or 0.0)


def draw(results: list[dict[str, Any]]) -> Figure:
    """One line per number of views."""
    figure = Figure(figsize=(6.5, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, words in WORDS.items():
        own = [(100 * share_of(result), *gain(result, name)) for result in results if name in result["summary"]]
        if own:
            xs, ys, errors = zip(*own, strict=True)
            style = "--" if "independent" in name else "-"
            axes.errorbar(
                xs, ys, errors, marker="o", markersize=4, linewidth=1.4, linestyle=style, capsize=3, label=words
            )
    axes.axhline(0.0, color="gray", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.set(
        xlabel="share of a step with one view that an image costs once, in %",
        ylabel="gain over one view in equal time,\npoints of linear probe (held-out images)",
    )
    axes.legend(fontsize=8, loc="upper left")
    return figure


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per share and variant."""
    lines = ["| share | views | blr | steps | linear probe | gain |", "|---|---|---|---|---|---|"]
    for result in results:
        for name, row in result["summary"].items():
            score = row["held_out"]["linear"]
            shown = f"{100 * score['mean']:.1f} ± {100 * (score.get('std') or 0.0):.1f}"
            of = "" if name == result["baseline"] else f"{gain(result, name)[0]:+.1f}"
            words = WORDS.get(name, "1 view")
            lines.append(
                f"| {100 * share_of(result):.0f} % | {words} | {row['blr']:g} | {row['step']:.0f} | {shown} | {of} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
