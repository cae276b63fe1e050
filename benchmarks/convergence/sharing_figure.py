"""Views that share what an image costs once: linear probe by the number of views and of images per step.

    python benchmarks/convergence/sharing_figure.py \
      benchmarks/results/convergence_sharing_batches_vit_lite_4min.json --out docs/figures/sharing.png

Reads results of ``convergence.py sharing``, one panel for each ``--once-share``. Error bars are the standard deviation
over seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from convergence_sets import variants_of
from matplotlib.figure import Figure

from dmjd.figures.grid import save_figure
from dmjd.figures.panels import DPI


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


def rows_of(result: dict[str, Any]) -> list[tuple[int, str, int, dict[str, Any]]]:
    """(views, kind of masks, images per step, row of the summary) of each variant, in order."""
    variants, rows = variants_of("sharing", False), []
    for name, row in result["summary"].items():
        own = variants[name].overrides
        images = own.get("batch_size", result["settings"]["batch_size"])
        rows.append((own["num_views"], own.get("masks", "disjoint"), images, row))
    return sorted(rows, key=lambda row: row[:3])


def draw(results: list[dict[str, Any]]) -> Figure:
    """One panel per share, one line per number of views."""
    figure = Figure(figsize=(5.2 * len(results), 3.6), dpi=DPI, layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        rows = rows_of(result)
        for views, masks in dict.fromkeys(row[:2] for row in rows):
            own = [(images, row["held_out"]["linear"]) for v, m, images, row in rows if (v, m) == (views, masks)]
            label = "1 view" if views == 1 else f"{views} {masks} views"
            axes.errorbar(
                [images for images, _ in own],
                [100 * score["mean"] for _, score in own],
                [100 * score.get("std", 0.0) for _, score in own],
                marker="o",
                capsize=3,
                linestyle="-" if masks == "disjoint" else "--",
                label=label,
            )
        images = sorted({row[2] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(images, list(map(str, images)))
        axes.grid(alpha=0.3)
        axes.set(
            title=f"an image costs {100 * share_of(result):.0f} % of a step with one view",
            xlabel="images per step",
            ylabel="linear probe, % (held-out images)",
        )
        axes.legend(fontsize=8)
    return figure


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per share and variant."""
    lines = ["| share | images | views | blr | steps | kNN | linear probe |", "|---|---|---|---|---|---|---|"]
    for result in results:
        for views, masks, images, row in rows_of(result):
            shown = "1" if views == 1 else f"{views}, {masks}"
            cells = [f"{100 * share_of(result):.0f} %", str(images), shown, f"{row['blr']:g}", f"{row['step']:.0f}"]
            for score in (row["held_out"][task] for task in ("knn", "linear")):
                cells.append(f"{100 * score['mean']:.1f} ± {100 * score.get('std', 0.0):.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
