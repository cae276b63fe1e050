"""Monitoring of a run: evaluations at intervals, warnings, and the final evaluation."""

import json

import numpy as np
import pytest
from PIL import Image
from support import TINY_FIELDS, metrics

import dmjd
from dmjd.config import recipes
from dmjd.data.sources.registry import open_source
from dmjd.engine.console import Console
from dmjd.engine.loop import Report, TrainState
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.callbacks import NUM_EVALS, Monitor
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import RunFolder


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """20 training and 10 test images of two classes."""
    root = tmp_path_factory.mktemp("labeled")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for i in range(count):
            folder = root / split / ("dark", "light")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 120, (32, 32, 3)) + 120 * (i % 2)
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return root


FIELDS = TINY_FIELDS | {"labels": "folder", "num_workers": 0, "batch_size": 10}


@pytest.fixture(scope="module")
def finished(labeled, tmp_path_factory):
    """A run of five steps with evaluations at steps two and four, its model and its result."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = recipes.folder(labeled, str(out), steps=5, **FIELDS | {"eval_every": 2, "final_eval": True})
    model = build_model(config)
    return config, model, dmjd.pretrain(config, model=model)


def test_evaluations_at_intervals(finished):
    _, _, result = finished
    lines = [m for m in metrics(result.path) if "knn_top1" in m]
    assert [m["step"] for m in lines] == [2, 4]
    assert set(lines[0]) == {"step", "knn_top1", "knn_random_init", "knn_raw_pixels"}
    assert lines[0]["knn_raw_pixels"] == lines[1]["knn_raw_pixels"] == 1.0
    figures = {file.name for file in (result.path / "figures").iterdir()}
    assert figures == {"step-000000002.png", "step-000000004.png", "final.png", "curves.png"}


def test_the_final_evaluation_equals_one_of_the_run_folder(finished, tmp_path):
    """In memory, right after training, it must give the same as ``dmjd evaluate`` later, and restore the mode."""
    _, model, result = finished
    assert model.encoder.training
    assert set(result.evaluation) == {"knn", "linear"}
    for task, content in result.evaluation.items():
        assert json.loads((result.path / "evaluation" / f"{task}.json").read_text()) == content
        assert dmjd.evaluate(task, result.path, out=tmp_path / task, device="cpu", num_workers=0) == content


def test_a_finished_run_reads_its_evaluation(finished):
    config, _, result = finished
    files = [result.path / "evaluation" / f"{task}.json" for task in ("knn", "linear")]
    before = [file.stat().st_mtime_ns for file in files]
    again = dmjd.pretrain(config)
    assert again.finished
    assert again.evaluation == result.evaluation
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.fixture
def monitor(labeled, tmp_path):
    config = recipes.folder(labeled, str(tmp_path / "run"), steps=100, **FIELDS)
    source = open_source(str(labeled), split="train", labels="folder")
    folder, model = RunFolder(tmp_path / "run"), build_model(config)
    model.encoder.preprocess = Preprocess(config.size)
    yield Monitor(config.replace(eval_every=None), model, source, folder, Console())
    folder.close()


def report(step: int, progress: float, scalars: dict[str, float] | None = None) -> Report:
    return Report(TrainState(step=step), progress, scalars, before=(step - 1) / 100)


def test_ten_evaluations_per_run_if_no_interval_is_given(monitor):
    assert NUM_EVALS == 10
    due = []
    for step in range(1, 101):
        if monitor.is_due(report(step, step / 100)):
            due.append(step)
            monitor.evaluate(report(step, step / 100))
        if step == 30:
            break
    assert due == [10, 20, 30]
    assert not monitor.is_due(report(100, 1.0))  # left to finish()


def test_a_warning_of_a_target_is_shown_once(monitor, capsys):
    target = next(iter(monitor.model.branch_targets.values()))
    target.warning = lambda scalars: "it collapsed" if scalars["loss"] > 1 else None
    for step, loss in ((1, 0.5), (2, 2.0), (3, 2.0)):
        monitor.after_step(report(step, 0.1, {"loss": loss}))
    assert capsys.readouterr().err == "warning: step 2: it collapsed\n"


def test_too_many_unreadable_images_stop_the_run(monitor, capsys):
    monitor.count_unreadable([("a.png", "empty")] * 3)
    assert capsys.readouterr().err.count("a.png") == 1
    monitor.report_unreadable()
    assert (monitor.folder.path / "unreadable.txt").read_text() == "a.png\tempty\n"
    with pytest.raises(ValueError, match="images can't be read"):
        monitor.count_unreadable([(f"{i}.png", "empty") for i in range(11)])


def test_a_checkpoint_of_other_images_is_refused(monitor):
    class Other:
        state = monitor.state() | {"data": "other"}

    with pytest.raises(ValueError, match="are not those this run began with"):
        monitor.restore(Other)
    Other.state = monitor.state() | {"bad": [["a.png", "empty"]]}
    monitor.restore(Other)
    assert monitor.unreadable.count == 1
    # More than tolerated ended the run and are part of its checkpoint; they may be readable again.
    Other.state = monitor.state() | {"bad": [[f"{i}.png", "gone"] for i in range(11)]}
    fresh = Monitor(monitor.config, monitor.model, monitor.source, monitor.folder, monitor.console)
    fresh.restore(Other)
    fresh.count_unreadable([("a.png", "empty")])
    assert fresh.unreadable.count == 1
