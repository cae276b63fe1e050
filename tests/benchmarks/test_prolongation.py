"""The study of prolonged runs: its table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "convergence"))
from prolongation import LENGTHS, table


def test_each_run_is_longer_than_the_one_it_prolongs():
    assert list(LENGTHS) == sorted(set(LENGTHS))


def test_the_table_has_a_row_for_each_length_and_way_with_means_and_deviations():
    results = [
        {"way": way, "length": length, "steps": 10 * length, "trained": 10 * length + 2}
        | {task: {"result": score, "random_init": 0.1} for task in ("knn", "linear")}
        for length in (1, 2)
        for way in ("cosine", "wsd")
        for score in (0.2, 0.4)
    ]
    lines = table(results).splitlines()
    assert lines[2] == "| cosine, straight, 1 x | 10 (12) | 30.0 ± 14.1 | 30.0 ± 14.1 | 10.0 ± 0.0, 10.0 ± 0.0 |"
    assert [line.split(" |")[0] for line in lines[3:]] == [
        "| wsd, prolonged, 1 x",
        "| cosine, straight, 2 x",
        "| wsd, prolonged, 2 x",
    ]
