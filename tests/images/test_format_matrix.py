"""A part of the matrix of image formats; all of it is in the storm."""

from collections import Counter
from random import Random

import pytest
from format_matrix import judge, png_cells, tiff_cells


def test_every_png():
    wrong = [(cell, outcome) for cell in png_cells() if (outcome := judge(cell)) != "right"]
    assert not wrong


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb", "separated", "palette"])
def test_some_tiffs(photometric):
    cells = [cell for cell in tiff_cells() if cell.photometric == photometric and cell.compression in (None, "zlib")]
    outcomes = {cell: judge(cell, seed) for seed, cell in enumerate(Random(1).sample(cells, 150))}
    assert not {cell: outcome for cell, outcome in outcomes.items() if outcome.startswith("WRONG")}
    kinds = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    assert kinds["right"] > (4 if photometric == "palette" else 50), kinds  # palettes are unsigned, of 8 or 16 bits
