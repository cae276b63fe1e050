"""Draw the curves of convergence studies again from their JSON files; the figures are not kept in the repository.

python benchmarks/convergence/redraw.py benchmarks/results/convergence_*.json
"""

import argparse
import json
from pathlib import Path

from convergence_report import curves_figure

from dmjd.figures.grid import save_figure


def main() -> None:
    """Write each figure next to its JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        title = file.stem.removeprefix("convergence_").replace("_", ", ")
        save_figure(curves_figure(runs, title), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
