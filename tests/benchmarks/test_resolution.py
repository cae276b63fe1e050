"""The study of small images first: equal time for every way, and the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "convergence"))
from resolution import LARGE, WAYS, table


def test_every_way_takes_the_whole_time():
    for parts in WAYS.values():
        assert sum(share for _, share in parts) == pytest.approx(1.0)
    assert WAYS["128, then 224 pixels"][-1] == (LARGE, pytest.approx(0.1))


def test_the_table_has_means_and_deviations():
    runs = [
        {
            "way": "a",
            "steps": [3, 1],
            "knn": {"result": x, "random_init": 0.1},
            "linear": {"result": x, "random_init": 0},
        }
        for x in (0.2, 0.4)
    ]
    assert table(runs).splitlines()[-1] == "| a | 3 + 1 | 30.0 ± 14.1 | 30.0 ± 14.1 | 10.0 ± 0.0, 0.0 ± 0.0 |"
