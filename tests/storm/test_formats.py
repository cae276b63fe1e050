"""The whole matrix of image formats: every cell is read right, or refused with its reason."""

import os
from collections import Counter
from random import Random

import pytest
from format_matrix import judge, png_cells, tiff_cells
from storm.table import record

SHARE = float(os.environ.get("SHARE", 0.02))  # of the TIFF cells, of which there are 340,000

# What may be refused, and why.
REFUSALS = (
    "it has {n} channels, in_chans is",
    "inverted samples of type",
    "a palette with extra samples is not supported",
    "premultiplied samples of type",
    "needs the package imagecodecs",
)


@pytest.mark.slow
def test_every_cell_of_the_format_matrix():
    random = Random(0)
    cells = [*png_cells(), *(cell for cell in tiff_cells() if random.random() < SHARE)]
    outcomes: Counter[str] = Counter()
    lost = []
    for seed, cell in enumerate(cells):
        outcome = judge(cell, seed)
        kind = outcome.partition(":")[0]
        outcomes[kind] += 1
        allowed = any(part in outcome for refusal in REFUSALS for part in refusal.split("{n}")[-1:])
        if kind == "WRONG" or (kind == "refused" and not allowed):
            lost.append((cell, outcome))
    tried = len(cells) - outcomes["not writable"]
    record("image formats", tried=tried, lost=len(lost))
    assert not lost, f"{len(lost)} of {tried}:\n" + "\n".join(map(str, lost[:20]))
    assert outcomes["right"] > tried / 2, outcomes
