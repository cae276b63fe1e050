"""Monitoring of a run: evaluations at intervals, warnings, and the final evaluation."""

import json
import re
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from support import TINY_FIELDS, metrics

import dmjd
import dmjd.files
from dmjd.config import recipes
from dmjd.data.sources.registry import open_source
from dmjd.encoders.stored import encoder_bytes, weights_hash
from dmjd.engine.console import Console
from dmjd.engine.loop import Report, TrainState
from dmjd.evaluation.results import read_evaluation
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining import callbacks
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


KNN = {"knn_top1", "knn_random_init", "knn_raw_pixels"}
FEATURES = {"effective_rank", "feature_std", "alpha_req"}
FIELDS = TINY_FIELDS | {"labels": "folder", "num_workers": 0, "batch_size": 10}


@pytest.fixture(scope="module")
def finished(labeled, tmp_path_factory):
    """A run of five steps with evaluations at steps two and four, its model and its result."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = recipes.folder(labeled, str(out), steps=5, **FIELDS | {"eval_every": 2, "final_eval": True, "held_out": 2})
    model = build_model(config)
    return config, model, dmjd.pretrain(config, model=model)


def test_evaluations_at_intervals(finished):
    _, _, result = finished
    lines = [m for m in metrics(result.path) if "effective_rank" in m]
    assert [m["step"] for m in lines] == [2, 4, 5]
    assert set(lines[0]) == {"step", *KNN, *FEATURES, "held_out_loss", "held_out_mim", "held_out_vis"}
    assert set(lines[1]) == {*lines[0], "neighbors_kept"}
    assert set(lines[2]) == {*lines[1]} - KNN  # measured on all images by the final evaluation
    assert lines[0]["knn_raw_pixels"] == lines[1]["knn_raw_pixels"] == 1.0
    figures = {file.name for file in (result.path / "figures").iterdir()}
    assert figures == {"step-000000002.png", "step-000000004.png", "final.png", "curves.png"}


def test_the_final_evaluation_equals_one_of_the_run_folder(finished, tmp_path):
    """In memory, right after training, it must give the same as ``dmjd evaluate`` later, and restore the mode."""
    _, model, result = finished
    assert model.encoder.training
    assert set(result.evaluation) == {"knn", "linear"}
    for task, content in result.evaluation.items():
        assert read_evaluation(result.path / "evaluation" / f"{task}.json") == content
        assert dmjd.evaluate(task, result.path, out=tmp_path / task, device="cpu", num_workers=0) == content


def test_a_finished_run_reads_its_evaluation(finished):
    config, _, result = finished
    files = [result.path / "evaluation" / f"{task}.json" for task in ("knn", "linear")]
    before = [file.stat().st_mtime_ns for file in files]
    again = dmjd.pretrain(config)
    assert again.finished
    assert again.evaluation == result.evaluation
    assert [file.stat().st_mtime_ns for file in files] == before


def test_the_time_of_a_final_evaluation_of_many_images_is_told_and_changes_no_result(
    finished, tmp_path, monkeypatch, capsys
):
    config, _, result = finished
    config = config.replace(out=str(tmp_path / "run"))
    shutil.copytree(result.path, config.out)
    shutil.rmtree(tmp_path / "run" / "evaluation")
    monkeypatch.setattr(callbacks, "MANY_IMAGES", 1)
    again = dmjd.pretrain(config)
    assert re.search(r"final evaluation: knn and linear, with their baselines, about \d+ s \(", capsys.readouterr().err)
    for task, content in again.evaluation.items():
        assert content["result"] == result.evaluation[task]["result"]


@pytest.fixture
def monitor(labeled, tmp_path):
    config = recipes.folder(labeled, str(tmp_path / "run"), steps=100, **FIELDS)
    source = open_source(str(labeled), split="train", labels="folder")
    folder, model = RunFolder(tmp_path / "run"), build_model(config)
    model.encoder.preprocess = Preprocess(config.size)
    yield Monitor(config.replace(eval_every=None), model, source, None, folder, Console())
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
    assert monitor.is_due(report(100, 1.0))


def trained(step: int, seconds: float) -> Report:
    """After a step at one image a second."""
    return Report(TrainState(step, images=int(seconds), seconds=seconds), step / 100, None, before=(step - 1) / 100)


def test_an_evaluation_that_takes_too_long_is_left_out(monitor, capsys):
    with closing(monitor.start(0, 0.0)[0]):
        assert monitor.evaluate(trained(10, 40.0)) == {}
        assert monitor.evaluate(trained(20, 80.0)) == {}
        # Two seconds for a figure, and half a second for 30 images of kNN and 20 of features.
        assert capsys.readouterr().err == (
            "step 10: no evaluation, which would take about 27 s; at most 10 % of the time goes to evaluations "
            "(--eval-every N: one every N steps)\n"
        )
        assert not list((monitor.folder.path / "figures").glob("*"))
        assert set(monitor.evaluate(trained(90, 360.0))) == KNN | FEATURES
        assert [file.name for file in (monitor.folder.path / "figures").iterdir()] == ["step-000000090.png"]


def test_an_interval_that_was_given_is_kept_and_its_cost_is_told_once(monitor, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, "TOLD_SECONDS", 0.0)
    monitor = Monitor(
        monitor.config.replace(eval_every=5), monitor.model, monitor.source, None, monitor.folder, monitor.console
    )
    with closing(monitor.start(0, 0.0)[0]):
        for step in (5, 10):
            assert "knn_top1" in monitor.evaluate(trained(step, 1.0))
    cost = r"an evaluation takes about \d+ s; there is one every 5 steps \(--eval-every\)"
    assert len(re.findall(cost, capsys.readouterr().err)) == 1


def test_online_knn_whose_images_cannot_be_read_is_a_warning(labeled, tmp_path, capsys):
    data = shutil.copytree(labeled, tmp_path / "data")
    config = recipes.folder(data, str(tmp_path / "run"), steps=3, **FIELDS | {"eval_every": 1})
    for file in (data / "test").rglob("*.png"):
        file.write_bytes(b"no image")
    result = dmjd.pretrain(config)
    assert result.finished
    assert capsys.readouterr().err.count("warning: online kNN: not measured: no image of") == 1


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


def test_the_encoder_is_written_to_memory_once_for_a_checkpoint(monitor, monkeypatch):
    written = []
    monkeypatch.setattr(
        dmjd.files, "save", lambda *args, **options: written.append(save(*args, **options)) or written[-1]
    )
    state = monitor.state()
    assert len(written) == 1
    assert state["weights"] == weights_hash(monitor.model.encoder)


def test_a_checkpoint_of_other_images_is_refused(monitor):
    class Other:
        path = monitor.folder.path / "step-000000001.safetensors"
        state = monitor.state() | {"data": "other"}

    with pytest.raises(ValueError, match="are not those this run began with"):
        monitor.restore(Other)
    Other.state = monitor.state() | {"bad": [["a.png", "empty"]]}
    monitor.restore(Other)
    assert monitor.unreadable.count == 1
    # More than tolerated ended the run and are part of its checkpoint; they may be readable again.
    Other.state = monitor.state() | {"bad": [[f"{i}.png", "gone"] for i in range(11)]}
    fresh = Monitor(monitor.config, monitor.model, monitor.source, None, monitor.folder, monitor.console)
    fresh.restore(Other)
    fresh.count_unreadable([("a.png", "empty")])
    assert fresh.unreadable.count == 1


def files_of(run):
    """What a run folder holds, by name; figures and logs count by their presence."""
    return {
        str(file.relative_to(run)): file.read_bytes() if file.suffix in (".safetensors", ".json", ".jsonl") else None
        for file in run.rglob("*")
        if file.is_file() and "events" not in file.name
    }


def test_a_finished_run_makes_again_what_a_kill_left_missing_or_stale(finished, tmp_path, capsys):
    """The final checkpoint is written; the encoder, the evaluation and the last figures are not."""
    config, _, result = finished
    run = shutil.copytree(result.path, tmp_path / "run")
    expected = files_of(run)
    (run / "evaluation" / "linear.json").unlink()
    (run / "figures" / "final.png").unlink()
    (run / "checkpoints" / ".step-000000002.safetensors.a1b2c3d4.tmp").write_bytes(b"half")
    encoder = run / "encoder.safetensors"
    stale = dmjd.load_encoder(run)
    with torch.no_grad():
        stale.pos_embed.add_(1)
    flipped = bytearray(encoder.read_bytes())
    flipped[-1] ^= 1
    for content in (encoder_bytes(stale), bytes(flipped), None):
        encoder.unlink(missing_ok=True)
        if content is not None:
            encoder.write_bytes(content)
        again = dmjd.pretrain(config.replace(out=str(run)))
        assert "encoder.safetensors was missing or not that of the newest checkpoint" in capsys.readouterr().err
        assert {name: value for name, value in files_of(run).items() if name != "config.json"} == {
            name: value for name, value in expected.items() if name != "config.json"
        }
    assert again.evaluation == result.evaluation


def test_metrics_of_a_run_that_was_killed_before_its_first_checkpoint_are_not_kept(labeled, tmp_path):
    run = tmp_path / "run"
    config = recipes.folder(labeled, str(run), steps=3, **FIELDS)
    straight = dmjd.pretrain(config.replace(out=str(tmp_path / "straight")))
    run.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "lo']))
    dmjd.pretrain(config)
    assert [(m["step"], m["loss"]) for m in metrics(run)] == [(m["step"], m["loss"]) for m in metrics(straight.path)]


def test_a_figure_that_fails_is_a_warning(labeled, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "figures").write_text("in the way")
    config = recipes.folder(labeled, str(run), steps=2, **FIELDS | {"eval_every": 1, "final_eval": True})
    result = dmjd.pretrain(config)
    assert result.finished
    assert set(result.evaluation) == {"knn", "linear"}
    assert capsys.readouterr().err.count("warning: a figure could not be made: could not write") == 3


def test_show_says_that_it_uses_an_older_checkpoint(finished, tmp_path):
    _, _, result = finished
    run = shutil.copytree(result.path, tmp_path / "run")
    checkpoints = run / "checkpoints"
    shutil.copy(checkpoints / "final.safetensors", checkpoints / "step-000000001.safetensors")
    damaged = bytearray((checkpoints / "final.safetensors").read_bytes())
    damaged[-1] ^= 1
    (checkpoints / "final.safetensors").write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"final.safetensors is damaged.*step-000000001.safetensors, an older one"):
        dmjd.show("masks", run, out=tmp_path / "masks.png")
    figure = (tmp_path / "masks.png").stat().st_mtime_ns
    with pytest.raises(ValueError, match="cannot be written"):
        dmjd.show("masks", run, out=tmp_path / "masks.png" / "inside.png")
    assert (tmp_path / "masks.png").stat().st_mtime_ns == figure
