"""The GPU kit: what is run first, what travels, records that continue, plain layers, the length of the study."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import KEYS, smooth_images, tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / "gpu"), str(BENCHMARKS / "speed"), str(BENCHMARKS / "convergence")]

from convergence_sets import variants_of  # noqa: E402
from floors import step_floors  # noqa: E402
from pack import MAX_COMMAND, call  # noqa: E402
from part_study import (  # noqa: E402
    BLRS,
    FIRST_SECONDS,
    GAIN,
    SEARCH_SHARE,
    SEEDS,
    SPARE,
    VARIANTS,
    WAVE_SECONDS,
    minutes_of,
)
from plan import COMMAND_SECONDS, NEEDS, OVERTIME, PARTS, calls, first_call  # noqa: E402
from record import ROOT, Record  # noqa: E402
from report import print_tables  # noqa: E402
from run import is_older, needed_wheels  # noqa: E402
from sides import COMPARISONS, config_of, layers_of  # noqa: E402
from speed_cases import EAGER, cases  # noqa: E402

from dmjd.runs.build import build_model  # noqa: E402


def complete(folder: Path, *parts: str) -> Path:
    for part in parts:
        Record(part, folder, folder).describe(complete=True)
    return folder


QUICK = ["check", "speed", "loader", "similarity"]


@pytest.mark.parametrize(("minutes", "parts"), [(14, QUICK), (9, QUICK[:3]), (4.5, ["check"])])
def test_what_is_run_first(tmp_path, minutes, parts):
    first = calls(minutes, tmp_path)[0]
    assert list(first) == parts
    assert sum(first.values()) <= min(COMMAND_SECONDS, 60 * minutes - 90)
    assert all(seconds >= NEEDS[part].least for part, seconds in first.items())
    assert "run.py check=" in first_call(minutes, tmp_path)


def test_later_visits_run_what_is_missing(tmp_path):
    assert list(calls(5, complete(tmp_path, "check"))[0]) == ["speed"]
    assert list(calls(14, tmp_path / "nothing")[1]) == ["study"]
    assert calls(14, complete(tmp_path, "speed", "loader", "similarity"))[0] == {"study": COMMAND_SECONDS - OVERTIME}
    assert first_call(14, complete(tmp_path, "study")) == "everything is measured"
    assert "too few" in first_call(3.9, tmp_path / "nothing")


def test_the_call_is_short_enough():
    text = call(dict.fromkeys(PARTS, 100), ROOT / ".gpu")
    assert len(text.splitlines()[0]) < MAX_COMMAND
    assert "carry:    .gpu" in text


def test_wheels_are_installed_where_they_are_missing_or_too_old(tmp_path):
    assert is_older("1.0.9", "1.0.21")
    assert not is_older("2.5", "2.5.0")
    for name in ("nowhere_to_be_found-1.0-py3-none-any.whl", "torch-99-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [wheel.name.split("-")[0] for wheel in needed_wheels(tmp_path)] == ["nowhere_to_be_found"]


def test_a_record_continues_earlier_visits(tmp_path):
    first = Record("speed", tmp_path / "first", tmp_path / "none")
    first.put("a", 1)
    first.describe(complete=False)
    second = Record("speed", tmp_path / "second", tmp_path / "first")
    second.put("b", 2)
    content = json.loads((tmp_path / "second" / "speed.json").read_text())
    assert content["entries"] == {"a": 1, "b": 2}
    assert content["complete"] is False


def test_every_case_is_named_once():
    for toy in (False, True):
        names = [case.name for case in cases(toy)]
        assert len(set(names)) == len(names)
    assert all(case.mode == EAGER for case in cases(False)[:10])


def test_tables_of_every_case(tmp_path, capsys):
    """Cases with all their values, profiles, errors and cases that never ended."""
    record = Record("speed", tmp_path, tmp_path)
    record.describe(machine={"gpu": "a card"})
    record.put("a card | rates", {"matmul_bf16": 8e14})
    for case in cases(toy=False):
        result = {"images_per_s": 100.0 + 100 * (case.mode != EAGER), "mfu": 0.4, "share_of_floor": 0.5, "batch": 50}
        record.put(f"a card | {case.name}", result if case.kind == "profile" else result | {"compile_s": 30.0})
    for case, entry in zip(cases(toy=True), ({"error": "RuntimeError: no"}, {"running": 1}), strict=False):
        record.put(f"a card, toy | {case.name}", entry)
    Record("similarity", tmp_path, tmp_path).put("a card | near duplicates | 100 x 3", {"seconds": 2.0})
    (tmp_path / "study.md").write_text("| the study |\n")
    print_tables(tmp_path)
    printed = capsys.readouterr().out
    assert "| a card, near duplicates, 100 x 3 | 2.0 |" in printed
    assert "| the study |" in printed
    assert "eager, 128 images a step: ConvViT-B, DMJD over the dense reference (goal 1.6): 1.00 times" in printed
    assert "RuntimeError: no" in printed
    assert "not measured" in printed


@pytest.mark.parametrize("encoder", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_plain_layers_compute_the_same(encoder):
    model, found = tiny_model(encoder), []
    for name in ("recompute", "plain + plain depthwise"):
        model.zero_grad()
        with layers_of(name):
            out = model(*smooth_images(), keys=KEYS)
        out["loss"].backward()
        found.append((out["loss"].detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, gradients), (plain_loss, plain_gradients) = found
    torch.testing.assert_close(plain_loss, loss)
    for plain, ours in zip(plain_gradients, gradients, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_floors(comparison):
    model = build_model(config_of(comparison, toy=True))
    floors = step_floors(model, 4, {"matmul_bf16": 1e12, "copy": 1e12})
    assert floors["arithmetic_ms"] == pytest.approx(4 * 3 * model.flops() / 1e9)
    more = step_floors(model, 8, {"matmul_bf16": 1e12, "copy": 1e12})
    assert floors["memory_ms"] < more["memory_ms"] < 2 * floors["memory_ms"]  # parameters are moved once a step


def test_the_runs_of_the_study_fit_into_its_time():
    def seconds(given: float) -> float:
        steps = 60 * minutes_of(given) * len(VARIANTS) * (SEEDS + len(BLRS) * SEARCH_SHARE) / GAIN
        return FIRST_SECONDS + 2 * WAVE_SECONDS + SPARE + steps

    for given in (NEEDS["study"].least, 400, COMMAND_SECONDS):
        assert seconds(given) == pytest.approx(given, rel=0.02)
    assert set(VARIANTS) <= set(variants_of("card", False))
