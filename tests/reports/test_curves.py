"""Curves of a report."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dmjd.config.recipes import digits
from dmjd.reports.curves import curve_panels, thinned
from dmjd.reports.facts import FINISHED, RunFacts


def run(name: str, lines: list[dict]) -> RunFacts:
    return RunFacts(Path(name), name, digits(out=name), FINISHED, {"evaluations": {}}, {}, lines)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(10, 100))
def test_thinning_keeps_ends_and_extremes(values, most):
    points = [(i, None, None, value) for i, value in enumerate(values)]
    kept = thinned(points, most)
    assert len(kept) <= most
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    for extreme in (min, max):
        assert extreme(p[3] for p in kept) == extreme(values)
    assert [p[0] for p in kept] == sorted({p[0] for p in kept})


def test_what_is_no_number_is_left_out():
    lines = [
        {"step": 1, "loss": 2.0, "lr": float("nan"), "note": "x", "knn_top1": True},
        {"step": 2, "loss": float("inf"), "epoch": 0.5, "seconds": 30.0, "surprise": 1e300},
        {"step": 3, "loss": 1.0, "epoch": 1, "seconds": 60.0, "surprise": 4},
    ]
    panels = {panel["title"]: panel["curves"] for panel in curve_panels([run("a", lines)])}
    assert panels.keys() == {"loss", "surprise"}
    (loss,), (surprise,) = panels.values()
    assert loss["y"] == [2.0, 1.0]
    assert loss["minutes"] == [None, 1.0]
    assert surprise["step"] == [3]


def test_evaluations_have_a_place_on_the_axes_of_epochs_and_time():
    """Their lines hold neither; a step of one may lie between the steps of logged lines, or after them."""
    logged = [{"step": step, "loss": 1.0, "epoch": step / 8, "seconds": 60.0 * step} for step in (1, 10, 20)]
    lines = [logged[0], logged[1], {"step": 10, "knn_top1": 0.1}, {"step": 15, "knn_top1": 0.2}, logged[2]]
    lines += [{"step": 20, "knn_top1": 0.3}, {"step": 25, "knn_top1": 0.4}]
    (curve,) = next(panel["curves"] for panel in curve_panels([run("a", lines)]) if "kNN" in panel["title"])
    assert curve["step"] == [10, 15, 20, 25]
    assert curve["epoch"] == [1.25, 1.875, 2.5, None]
    assert curve["minutes"] == [10.0, 15.0, 20.0, None]


def test_one_panel_per_scalar_for_several_runs():
    lines = [{"step": 1, "loss": 1.0, "mim": 0.5, "knn_top1": 0.5, "knn_raw_pixels": 0.4, "effective_rank": 9.0}]
    one = [panel["title"] for panel in curve_panels([run("a", lines)])]
    two = [panel["title"] for panel in curve_panels([run("a", lines), run("b", lines)])]
    assert one == ["loss", "online kNN, top-1", "effective rank"]
    assert two == ["loss", "loss: mim", "online kNN, top-1", "effective rank"]
