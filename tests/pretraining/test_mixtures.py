"""Runs on several sources: the order stays when they are killed and resumed, and what else knows about them."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image
from support import TINY, TINY_FIELDS, assert_same_bits, metrics, mistake

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.config.plan import PlanConfig
from dmjd.data.order import Part
from dmjd.data.sources.registry import open_source
from dmjd.pretraining.held_out import hold_out, proportional
from dmjd.pretraining.plan import command_of
from dmjd.pretraining.plan_choices import choose_start

FIELDS = TINY_FIELDS | {"batch_size": 8, "num_workers": 0, "steps": 8, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of 20 and 8 images of several sizes, in two classes each."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for i in range(28):
        folder = root / ("A" if i < 20 else "B") / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (int(rng.integers(40, 60)), 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A finished run in which half of the samples are from B."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = recipes.folder([str(sets / "A"), f"{sets / 'B'}:0.5"], str(out), held_out=4, **FIELDS)
    assert dmjd.pretrain(config).finished
    return config


def stop_after(step):
    def stop(report):
        if report.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def test_a_stopped_run_ends_with_the_same_bits(run, sets, tmp_path, capsys):
    """Although an image joined, the sources moved, and workers read the images."""
    moved = shutil.copytree(sets, tmp_path / "moved")
    config = run.replace(out=str(tmp_path / "run"), data=tuple(one.replace(str(sets), str(moved)) for one in run.data))
    assert not dmjd.pretrain(config, hooks=[stop_after(3)]).finished
    assert "A: 20 images, 50 % of the samples, each image 0.7 times an epoch" in (text := capsys.readouterr().err)
    assert "B: 8 images, 50 % of the samples, each image 1.75 times an epoch" in text
    assert re.search(r"data +2 sets: 28 images, 4 of them held out", text)
    shutil.copy(moved / "A" / "cats" / "01.png", moved / "B" / "aaa.png")
    config = config.replace(data=tuple(reversed(config.data)))
    with pytest.raises(ValueError, match=r"data: .*A, .*B:0\.5 -> .*B:0\.5, .*A"):
        dmjd.pretrain(config)
    for data in ([f"{moved / 'A'}", f"{moved / 'B'}:0.4"], [str(moved / "A")]):
        with pytest.raises(ValueError, match=r"holds a run with other settings.*\n  data: "):
            dmjd.pretrain(config.replace(data=data))
    assert dmjd.pretrain(run.replace(out=config.out, num_workers=1)).finished  # at the path of the other run
    assert_same_bits(Path(config.out), Path(run.out))


def test_a_killed_run_ends_with_the_same_bits(run, sets, tmp_path):
    """Resumed from a checkpoint in the middle."""
    flags = {"--steps": 8, "--checkpoint-every": 4, "--batch-size": 8, "--num-workers": 0, "--held-out": 4}
    words = [str(word) for pair in flags.items() for word in pair]
    command = ["pretrain", "folder", *TINY, *words, "--out", str(tmp_path / "run"), "--data", *run.data]
    killed = forked.run(forked.killed_before, "final.safetensors", command, log=tmp_path / "log", seconds=120)
    assert killed == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert main(command) == 0
    assert_same_bits(tmp_path / "run", Path(run.out))


def test_another_order_of_other_images_is_noticed(run, sets, tmp_path):
    shutil.copytree(run.out, out := tmp_path / "run")
    (tmp_path / "B").symlink_to(sets / "A")
    (tmp_path / "A").symlink_to(sets / "B")
    data = [str(tmp_path / "A"), f"{tmp_path / 'B'}:0.5"]
    with pytest.raises(ValueError, match=r"none of the 8 images of .*A that were tried can be read, .*01\.png for"):
        dmjd.pretrain(run.replace(out=str(out), data=data, steps=12))


def test_a_source_that_vanishes_ends_the_run_and_may_come_back(run, sets, tmp_path, capsys):
    data = [str(sets / "A"), str(shutil.copytree(sets / "B", tmp_path / "B"))]
    config = run.replace(data=data, out=str(tmp_path / "run"), steps=30, held_out=0)

    def vanish(report):
        if report.state.step == 3:
            (tmp_path / "B").rename(tmp_path / "gone")

    with pytest.raises(ValueError, match=r"no image of .*B can be read any more, .*png for one: no such file") as error:
        dmjd.pretrain(config, hooks=[vanish])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"B"):
        dmjd.pretrain(config)
    (tmp_path / "gone").rename(tmp_path / "B")
    assert dmjd.pretrain(config).finished
    straight = config.replace(out=str(tmp_path / "straight"))
    assert len(metrics(Path(config.out))) == len(metrics(dmjd.pretrain(straight).path))


def test_a_run_is_evaluated_embedded_shown_exported_and_reported(run, sets, tmp_path, capsys):
    import pyarrow.parquet as pq

    copy = tmp_path / "run"
    shutil.copytree(run.out, copy)
    rows = pq.read_table(dmjd.embed(copy, out=tmp_path / "x.parquet", num_workers=0)).to_pydict()
    assert [Path(path).parts[-3] for path in rows["path"]] == ["A"] * 20 + ["B"] * 8
    for kind in ("masks", "outliers"):
        assert dmjd.show(kind, copy, out=tmp_path / f"{kind}.png").exists()
    found = dmjd.evaluate(
        "knn", copy, labels="folder", test_data=str(sets / "A"), device="cpu", num_workers=0, labels_per_class=2
    )
    assert found["data"]["classes"] == 2
    with pytest.raises(ValueError, match="has no test part: pass --test-data"):
        dmjd.evaluate("knn", copy, labels="folder", device="cpu")
    dmjd.export(copy, format="hub", out=tmp_path / "hub")
    assert "A, B:0.5" in (tmp_path / "hub" / "README.md").read_text()
    page = dmjd.report(copy, out=tmp_path / "report.html", num_images=0, device="cpu").read_text()
    assert "28 of A, B:0.5" in page
    assert f"--data {sets / 'A'} {sets / 'B'}:0.5" in page


def test_the_command_line_takes_several(sets, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["pretrain", "folder", *TINY, "--batch-size", 8, "--steps", 1, "--num-workers", 0, "--out", out]
    A, B = sets / "A", sets / "B"
    for data, message in {
        (A, f"{B}:nan"): "the weight of",
        (A, f"{B}:1"): "leaves no samples for",
        (A, A): "twice",
        (f"{A}:0.5",): "means nothing",
    }.items():
        assert message in mistake(capsys, *given, "--data", *data)
        assert not out.exists()
    assert main([str(a) for a in [*given, "--data", A, "--data", f"{B}:0.5"]]) == 0
    stored = json.loads((out / "config.json").read_text())
    assert stored["data"] == [str(A), f"{B}:0.5"]


def test_speed_is_measured_on_all(sets, tmp_path, capsys):
    file = tmp_path / "bench.json"
    flags = [*TINY, "--steps", 1, "--batch-size", 4, "--num-workers", 0, "--json", file, "--data", sets / "A"]
    assert main([str(word) for word in ["bench", *flags, f"{sets / 'B'}:0.5"]]) == 0
    assert json.loads(file.read_text())["settings"]["data"] == [str(sets / "A"), f"{sets / 'B'}:0.5"]


def test_a_plan_names_all(sets):
    asked = PlanConfig(data=[str(sets / "A"), "B:0.5"], hours=1)
    choices = choose_start(asked)
    command = command_of(choices, asked, choices.config(asked, minutes=50))
    assert command == f"dmjd pretrain folder --data {sets / 'A'} B:0.5 --out runs/mine --minutes 50"


def test_each_source_gives_its_part_of_the_held_out_images(sets, run):
    source = open_source([str(sets / "A"), f"{sets / 'B'}:0.5"])
    _, trained, held = hold_out(run.replace(held_out=7), source)
    folders = [Path(held.describe(i)).parts[-3] for i in range(len(held))]
    assert folders == ["A"] * 5 + ["B"] * 2
    assert trained.parts == (Part(15), Part(6, 0.5))
    assert not held.parts
    assert sorted([*trained.rows, *held.rows]) == list(range(28))
    with pytest.raises(ValueError, match="--held-out 27 leaves nothing of each set to train on"):
        hold_out(run.replace(held_out=27), source)


@pytest.mark.parametrize(
    ("lengths", "count", "expected"),
    [([10, 10], 5, [3, 2]), ([100, 1], 50, [50, 0]), ([1, 1, 5], 4, [0, 0, 4]), ([3, 3], 4, [2, 2]), ([7], 3, [3])],
)
def test_parts_in_proportion(lengths, count, expected):
    assert proportional(lengths, count) == expected
