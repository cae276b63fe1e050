"""A part of the matrix of image formats; all of it is in the storm."""

from collections import Counter
from random import Random

import pytest
from format_matrix import judge, png_cells, tiff_cells


def test_every_png():
    wrong = [(cell, verdict) for cell in png_cells() if (verdict := judge(cell)) != "right"]
    assert not wrong


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb", "separated", "palette"])
def test_some_tiffs(photometric):
    cells = [cell for cell in tiff_cells() if cell.photometric == photometric and cell.compression in (None, "zlib")]
    verdicts = {cell: judge(cell, seed) for seed, cell in enumerate(Random(1).sample(cells, 150))}
    assert not {cell: verdict for cell, verdict in verdicts.items() if verdict.startswith("WRONG")}
    kinds = Counter(verdict.partition(":")[0] for verdict in verdicts.values())
    assert kinds["right"] > (4 if photometric == "palette" else 50), kinds  # palettes are unsigned, of 8 or 16 bits
