"""Training steps on the device: every target, optimizer and precision; no waiting; compiled; memory."""

import gc
import resource
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from dense_sets import make_run
from device_runs import BATCH, CONV_VIT, batches, on_cpu, tiny_engine, train

from dmjd.cli.main import main
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.train_loader import Batch, TrainLoader
from dmjd.engine.loop import Engine, Report
from dmjd.engine.stop_signal import StopSignal

pytestmark = pytest.mark.cuda

ENCODERS = {"vit": {}, "conv_vit": CONV_VIT}
LOSS_ROUNDING = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}  # relative, of the first step


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(make_run(tmp_path_factory.mktemp("teacher") / "run"))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("precision", LOSS_ROUNDING)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("target", ["hog", "pixel", "ema", "teacher"])
def test_three_steps(device, target, optimizer, precision, encoder, teacher):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a CUDA device")
    own = {"target": target, "optimizer": optimizer} | ENCODERS[encoder]
    own |= {"teacher": teacher} if target == "teacher" else {}
    engine = tiny_engine(device, 3, precision=precision, **own)
    before = on_cpu(engine)
    logged = train(engine)
    expected = train(tiny_engine(torch.device("cpu"), 1, **own))
    assert logged[0]["loss"] == pytest.approx(expected[0]["loss"], rel=LOSS_ROUNDING[precision])
    after = on_cpu(engine)
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    if precision != "fp16":  # there the first steps may be skipped, until the scale of the loss fits
        assert logged[-1]["loss"] != logged[0]["loss"]
        assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    ("target", "compiled", "optimizer"),
    [
        ("hog", False, "adamw"),
        ("pixel", False, "adamw"),
        ("ema", False, "adamw"),
        ("hog", True, "adamw"),
        ("hog", False, "muon"),
    ],
    ids=str,
)
def test_steps_that_do_not_log_do_not_wait_for_the_device(device, encoder, target, compiled, optimizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_for(device))
    settings = {"drop_path": 0.1, "optimizer": optimizer} | ENCODERS[encoder]
    engine = tiny_engine(
        device, 40, log_every=1000, precision="bf16", target=target, clip_grad=3.0, compile=compiled, **settings
    )
    run_without_waiting(engine, batches(device))


def test_images_in_memory_are_cropped_without_waiting_for_the_device(device):
    source = SubsetSource(open_source("digits"), np.arange(100))
    loader = TrainLoader(source, img_size=(32, 32), batch_size=BATCH, device=device)
    assert loader.in_memory
    run_without_waiting(tiny_engine(device, 40, log_every=1000, precision="bf16"), loader.batches())


def run_without_waiting(engine: Engine, source: Iterator[Batch]) -> None:
    """Run 40 steps, of which the first is shown; on a GPU, waiting for it is an error from step 5 to step 39."""
    checked: list[int] = []

    def toggle(report: Report) -> None:
        if engine.fabric.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 5 <= report.state.step < 39 else "default")
        checked.append(report.state.step)

    try:
        engine.run(source, [toggle], StopSignal(), show_every=1000.0)
    finally:
        if engine.fabric.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert checked == list(range(1, 41))


def test_waiting_for_the_device_is_noticed(card):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(2, device=card).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compile_for(device: torch.device):
    """``torch.compile``; on a CPU without the slow compilation of the captured graph."""
    return torch.compile if device.type == "cuda" else partial(torch.compile, backend="aot_eager")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiled_is_eager_to_rounding_in_one_graph(device, encoder, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_for(device))
    steps = 6
    eager = train(tiny_engine(device, steps, **ENCODERS[encoder]))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = train_without_recompilation(tiny_engine(device, steps, compile=True, **ENCODERS[encoder]), after=2)
    for name in ("loss", "mim", "vis"):
        assert [s[name] for s in compiled] == pytest.approx([s[name] for s in eager], rel=2e-3)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("target", ["hog", "pixel", "ema", "teacher"])
def test_steps_replayed_as_cuda_graphs_are_eager_ones_to_rounding(device, target, encoder, teacher, monkeypatch):
    """Whether ``--compile`` may replay its steps as graphs, with accumulation, dropped paths and clipping too."""
    graphs = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}
    own = {"target": target, "accumulate": 2, "clip_grad": 3.0, "drop_path": 0.1} | ENCODERS[encoder]
    own |= {"teacher": teacher} if target == "teacher" else {}
    eager = train(tiny_engine(device, 6, **own))
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **graphs))
    replayed = train(tiny_engine(device, 6, compile=True, **own))
    for name in ("loss", "mim", "vis", "grad_norm"):
        assert [s[name] for s in replayed] == pytest.approx([s[name] for s in eager], rel=5e-3)
    torch.compiler.reset()


def train_without_recompilation(engine, after: int) -> list[dict[str, float]]:
    logged = []

    def watch(report: Report) -> None:
        torch._dynamo.config.error_on_recompile = report.state.step >= after
        logged.append(report.scalars)

    try:
        engine.run(batches(engine.fabric.device), [watch], StopSignal())
    finally:
        torch._dynamo.config.error_on_recompile = False
    return logged


@pytest.mark.parametrize("encoder", ENCODERS)
def test_memory_stays_flat_over_300_steps(device, encoder):
    engine, used = tiny_engine(device, 300, log_every=50, precision="bf16", **ENCODERS[encoder]), {}

    def measure(report: Report) -> None:
        if report.state.step in (50, 300):
            gc.collect()
            used[report.state.step] = allocated(device)

    engine.run(batches(device), [measure], StopSignal())
    assert used[300] <= used[50] + (1 << 16 if device.type == "cuda" else 64 << 20)


def allocated(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize(("mebibytes", "fits"), [(1024, True), (256, False)])
def test_a_batch_that_does_not_fit_is_divided(card, mebibytes, fits, tmp_path, capsys):
    """Until it fits, or with one clear line if weights and gradients alone are too large."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(card).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(card) + (mebibytes << 20)) / total)
    flags = ["--embed-dim", "384", "--depth", "12", "--num-heads", "6", "--batch-size", "512", "--steps", "2"]
    flags += ["--no-final-eval", "--eval-every", "0", "--no-report", "--device", "cuda"]
    try:
        code = main(["pretrain", "digits", "--encoder", "vit_small_patch4", *flags, "--out", str(tmp_path / "run")])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    error = capsys.readouterr().err
    assert "going on with --accumulate 2" in error
    assert "Traceback" not in error
    assert code == (0 if fits else 2)
    assert fits or "out of memory with 8 image(s) at a time" in error.splitlines()[-1]
