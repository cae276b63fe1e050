"""From which share of a step, spent once per image, more views pay: what they gain over one view in equal time.

    cd benchmarks/results && python ../convergence/crossing_figure.py \
      "0.4=convergence_sharing_0.4_vit_lite_2min.json" \
      "0.8=convergence_sharing_batches_vit_lite_4min.json" --out ../../docs/figures/crossing.png

Reads results of ``convergence.py`` whose variants differ in views and images per step, each with a name. The share is
that of a step with one view and the images of the baseline; it follows from the times of the steps. The gain is that of
the best variant with two, or four, disjoint views over the best one with one view, on held-out images. Error bars are
the standard error of the difference.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from convergence_sets import variants_of
from matplotlib.figure import Figure

from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI

VIEWS = (2, 4)


class Gain(NamedTuple):
    """What more views gain in points of linear probe, and its standard error (nan with one seed)."""

    points: float
    error: float


def main() -> None:
    """Read, draw, write; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="NAME=FILE, a JSON file of convergence.py")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    named = (text.partition("=")[::2] for text in given.results)
    results = {name: json.loads(Path(file).read_text()) for name, file in named}
    shares = {name: once_share(result) for name, result in results.items()}
    gains = {name: {views: gain(result, views) for views in VIEWS} for name, result in results.items()}
    print(table(shares, gains))
    save_figure(draw(shares, gains), given.out)


def sizes_of(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Variant -> (disjoint views, images per step)."""
    variants, batch_size = variants_of(result["set"], False), result["settings"]["batch_size"]
    own = {name: variants[name].overrides for name in result["summary"]}
    return {
        name: (each.get("num_views", 2), each.get("batch_size") or batch_size)
        for name, each in own.items()
        if each.get("masks", "disjoint") == "disjoint"
    }


def once_share(result: dict[str, Any]) -> float:
    """The share of a step with one view that its images cost once, whatever the number of views.

    A step of B images with K views takes a + B (once + K view) seconds; the numbers are fitted to all variants.
    """
    sizes, seconds = sizes_of(result), result["seconds_per_step"]
    rows = np.array([[1.0, images, views * images] for views, images in sizes.values()])
    times = np.array([seconds[name] for name in sizes])
    _, once, _ = np.linalg.lstsq(rows / times[:, None], np.ones(len(times)), rcond=None)[0]  # relative errors
    images = max(images for views, images in sizes.values() if views == 1)
    one_view = next(name for name, size in sizes.items() if size == (1, images))
    return max(0.0, float(once)) * images / float(seconds[one_view])


def gain(result: dict[str, Any], views: int) -> Gain:
    """What the best variant with so many views gains over the best one with one view."""

    def best(number: int) -> dict[str, float]:
        own = (name for name, (count, _) in sizes_of(result).items() if count == number)
        rows = [result["summary"][name] for name in own]
        row = max(rows, key=lambda row: row["held_out"]["linear"]["mean"])
        return row["held_out"]["linear"] | {"seeds": row["seeds"]}

    one, more = best(1), best(views)
    error = math.hypot(*(score.get("std", math.nan) / math.sqrt(score["seeds"]) for score in (one, more)))
    return Gain(100 * (more["mean"] - one["mean"]), 100 * error)


def draw(shares: dict[str, float], gains: dict[str, dict[int, Gain]]) -> Figure:
    """Gain by share, one line per number of views."""
    figure = Figure(figsize=(6.4, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names = sorted(shares, key=shares.__getitem__)
    for views, shift in zip(VIEWS, (-0.4, 0.4), strict=True):
        axes.errorbar(
            [100 * shares[name] + shift for name in names],
            [gains[name][views].points for name in names],
            [gains[name][views].error for name in names],
            marker="o",
            capsize=3,
            label=f"{views} views",
        )
    axes.axhline(0, color="black", linewidth=1)
    axes.secondary_xaxis("top").set_xticks([100 * shares[name] for name in names], names, fontsize=8)
    axes.set(
        xlim=(0, 100),
        xlabel="share of a step with one view that an image costs once, %",
        ylabel="points of linear probe over the best with one view",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def table(shares: dict[str, float], gains: dict[str, dict[int, Gain]]) -> str:
    """Markdown: one row per result."""
    lines = ["| | share | 2 views | 4 views |", "|---|---|---|---|"]
    for name in sorted(shares, key=shares.__getitem__):
        own = [f"{each.points:+.1f} ± {each.error:.1f}" for each in gains[name].values()]
        lines.append(f"| {name} | {100 * shares[name]:.0f} % | {' | '.join(own)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
