"""Plans: what is measured and expected, and that the command runs."""

import json
import shlex
import tempfile
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_FIELDS, metrics

import dmjd
from dmjd.cli.main import main
from dmjd.config.plan import PlanConfig
from dmjd.data.overview import overview
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.images.preprocess import Preprocess
from dmjd.model import MaskedImageModel
from dmjd.pretraining import plan as plan_module
from dmjd.pretraining import plan_measures
from dmjd.pretraining.plan import command_of
from dmjd.pretraining.plan_choices import (
    choose_parts,
    choose_start,
)
from dmjd.pretraining.plan_final import final_seconds
from dmjd.pretraining.plan_measures import Besides, Measured, measure
from dmjd.reports.report import time_for_report
from dmjd.runs.build import build_model

SIZES = {"encoder": "vit_tiny_patch8", "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}


def test_evaluations_get_a_tenth_and_the_report_its_share():
    besides = Besides(once=2.0, evaluation=5.0, end=4.0, report=time_for_report(50), final=7.0)
    assert besides.of(50) == pytest.approx(2 + 5 + 4 + 7)
    assert besides.of(3600) == pytest.approx(2 + 50 + 4 + 7 + time_for_report(3600) - time_for_report(50))


def test_all_else_that_a_run_does_is_rehearsed_and_leaves_nothing(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(plan_measures, "LONGEST", 1e9)  # on a slow machine too
    config = dmjd.recipes.folder(str(image_folder), batch_size=4, num_workers=0, device="cpu", held_out=2, **SIZES)
    source = open_source(str(image_folder))
    found = measure(config, source, 0.1, training=30.0)
    assert found.reading == 0  # images of different sizes are read for each step
    assert min(found.besides.evaluation, found.besides.once, found.besides.end) > 0
    assert found.besides.report == time_for_report(30.0)
    assert found.besides.final == 0  # there are no labels
    assert not list(tmp_path.iterdir())
    assert measure(config, source, 0.1).besides == Besides()


def test_the_final_evaluation_is_expected_where_a_run_ends_with_one(image_folder, tmp_path):
    """It takes longer with more images."""
    small = dmjd.create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=1, num_heads=2)
    small.preprocess = Preprocess((32, 32))
    config = dmjd.recipes.folder(str(image_folder), labels="folder", test_data=str(image_folder))
    source = open_source(str(image_folder), labels="folder")
    expected = min(final_seconds(config, small, source, 1.0) for _ in range(2))  # the first one is slower
    assert expected > 0
    assert final_seconds(config, small, SubsetSource(source, np.arange(2400) % 24), 1.0) > 5 * expected
    assert final_seconds(config.replace(final_eval=False), small, source, 1.0) == 0
    assert final_seconds(config.replace(test_data=None), small, source, 1.0) == 0
    assert final_seconds(config, small, open_source(str(image_folder)), 1.0) == 0


def test_reading_a_set_into_memory_is_measured_on_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_measures, "SAMPLE", 4)
    read: list[int] = []
    take = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, i: (read.append(i), take(self, i))[1])
    for i in range(60):
        Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    config = dmjd.recipes.folder(str(tmp_path), batch_size=4, num_workers=0, device="cpu", held_out=0, **SIZES)
    found = measure(config, open_source(str(tmp_path)), 0.1)
    assert found.reading > 0
    assert len(read) == 32 + 4 + 4  # to find out their sizes, twice, and into memory


class Limited(MaskedImageModel):
    """Raises what torch raises on a device whose memory holds four images."""

    def forward(self, images, *others, **more):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images, *others, **more)


def test_a_step_that_does_not_fit_into_memory_is_divided(image_folder, monkeypatch):
    def limited(*arguments):
        model = build_model(*arguments)
        model.__class__ = Limited
        return model

    monkeypatch.setattr(plan_measures, "build_model", limited)
    asked = PlanConfig(data=str(image_folder), hours=1, num_workers=0, device="cpu", batch_size=100)
    choices = choose_start(asked)
    choices.settings |= SIZES
    found = measure(choices.config(asked, held_out=0), open_source(asked.data), 0.1)
    assert (found.batch_size, found.accumulate) == (24, 8)  # all images, at most four at a time
    choose_parts(choices, found.batch_size, found.accumulate)
    config = choices.config(asked, minutes=1.0)
    assert "--batch-size 24 --accumulate 8" in command_of(choices, asked, config)
    assert "does not fit into memory" in choices.reasons["accumulate"]


def test_invalid_pixels_and_a_value_range_are_measured_as_they_are_trained(tmp_path, quick):
    rng = np.random.default_rng(0)
    for i in range(20):
        image = 1000 * rng.random((40, 40, 3), np.float32)
        image[: 1 + i] = np.nan
        np.save(tmp_path / f"{i:02}.npy", image)
    given = {"nodata": "auto", "value_range": (0, 1000), "encoder": "vit_tiny_patch8", "img_size": 32, "batch_size": 4}
    found = dmjd.plan(data=str(tmp_path), hours=1e-6, device="cpu", num_workers=0, **given)
    assert "--value-range 0.0 1000.0 --nodata auto" in found["command"]


def test_the_overview_of_frames_of_a_video(tmp_path):
    """Pairs of nearly equal gray images of two sizes, and one that cannot be read."""
    rng = np.random.default_rng(0)
    for i in range(20):
        if i % 2 == 0:
            image = rng.integers(0, 250, (40 + i, 60, 1)).repeat(3, axis=2).astype(np.uint8)
        Image.fromarray(image + np.uint8(i % 2)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "20.png").write_bytes(b"no image")
    found = overview(open_source(str(tmp_path)))
    assert (found.num_images, found.smallest, found.largest) == (21, (40, 60), (58, 60))
    assert found.typical[1] == 60
    assert found.gray == 1.0
    assert 0.3 < found.neighbors_alike < 0.7
    assert found.unreadable > 0


def test_each_image_of_a_small_set_counts_once(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 5 images"):
        overview(open_source(str(tmp_path)))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "0.png")
    found = overview(open_source(str(tmp_path)))
    assert (found.sampled, found.unreadable) == (5, pytest.approx(0.8))


@pytest.fixture
def quick(monkeypatch):
    """Measure for a moment."""
    monkeypatch.setattr(plan_module, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(plan_module, "MEASURE_SECONDS", 0.2)


def test_the_command_of_a_plan_runs(image_folder, tmp_path, quick, capsys):
    given = ["--data", image_folder, "--hours", 0.0005, "--out", tmp_path / "my run", "--device", "cpu"]
    assert main(["plan", *map(str, given), "--num-workers", "0", "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["choices"].keys() >= {"recipe", "img_size", "encoder", "batch_size"}
    expected = found["expected"]
    assert expected["steps"] * expected["seconds_per_step"] == pytest.approx(60 * expected["training_minutes"])
    assert expected["memory_gb"] > 0.1
    command = capsys.readouterr().out.splitlines()[-1]
    assert command == found["command"]
    assert "--minutes 0.0135" in command
    assert main(shlex.split(command)[1:]) == 0
    lines = metrics(tmp_path / "my run")
    assert lines[-1]["seconds"] >= 60 * 0.0135


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """The folder of a run of a number of channels."""

    def of(channels):
        out = str(tmp_path_factory.mktemp("trained") / str(channels))
        config = dmjd.recipes.dmjd(str(image_folder), out, steps=1, batch_size=4, in_chans=channels, **TINY_FIELDS)
        return str(dmjd.pretrain(config).path)

    return cache(of)


def test_images_are_read_with_the_channels_of_the_weights(image_folder, trained, quick):
    found = dmjd.plan(data=str(image_folder), hours=1e-6, init=trained(1), device="cpu", num_workers=0)
    assert found["command"].startswith(f"dmjd pretrain adapt --data {shlex.quote(str(image_folder))} --init ")
    assert "--batch-size 64" in found["command"]
    assert "--in-chans" not in found["command"]  # that of the weights is the default


def test_weights_take_the_channels_that_are_given(trained, tmp_path, quick):
    for i in range(20):
        np.save(tmp_path / f"{i:02}.npy", np.random.default_rng(i).integers(0, 255, (40, 40, 5), dtype=np.uint8))
    given = {"init": trained(3), "in_chans": 5, "device": "cpu", "num_workers": 0}
    assert "--in-chans 5" in dmjd.plan(data=str(tmp_path), hours=1e-6, **given)["command"]


def test_the_size_of_the_teachers_images_is_measured_and_reaches_the_command(image_folder, trained, quick, monkeypatch):
    sizes = []

    def recorded(config, *arguments):
        sizes.append(config.teacher_size)
        return measure(config, *arguments)

    monkeypatch.setattr(plan_module, "measure", recorded)
    given = {"teacher": trained(3), "teacher_size": 16, "encoder": "vit_tiny_patch8", "img_size": 32, "batch_size": 4}
    found = dmjd.plan(data=str(image_folder), hours=1e-6, device="cpu", num_workers=0, **given)
    assert "--teacher-size 16" in found["command"]
    assert set(sizes) == {(16,)}


def test_channels_reach_the_command(tmp_path, quick):
    (tmp_path / "gray").mkdir()
    for i in range(20):  # 12 bits in files of 16
        image = np.random.default_rng(i).integers(0, 4000, (40 + i, 40), dtype=np.uint16)
        Image.fromarray(image).save(tmp_path / "gray" / f"{i}.png")
    gray = dmjd.plan(data=str(tmp_path / "gray"), hours=0.001, in_chans=1, encoder="vit_tiny_patch8", img_size=32)
    assert "--in-chans 1" in gray["command"]
    assert any("pass --value-range 0 4095" in warning for warning in gray["warnings"])


def test_a_batch_that_is_made_smaller_is_measured_again(image_folder, quick, monkeypatch):
    """Part of a step takes the same time for a batch of any size."""
    sizes = []

    def recorded(config, *arguments):
        measured = measure(config, *arguments)
        sizes.append(measured.batch_size)
        return measured

    monkeypatch.setattr(plan_module, "measure", recorded)
    monkeypatch.setattr(plan_module, "_expected_images", lambda *_: 1e9)  # far too many, so that the first is large
    size = {"encoder": "vit_tiny_patch8", "img_size": 32}
    found = dmjd.plan(data=str(image_folder), hours=1e-6, device="cpu", num_workers=0, **size)
    assert sizes[-1] < sizes[-2]
    assert f"--batch-size {sizes[-1]} " in found["command"]
    assert found["expected"]["seconds_per_step"] == pytest.approx(sizes[-1] / found["expected"]["images_per_s"])


@pytest.mark.parametrize(("once", "views", "batch_size"), [(0.1, 4, 16), (0.001, 2, 32)])
def test_images_that_take_most_of_a_step_are_seen_in_more_views(once, views, batch_size, monkeypatch):
    """A machine that takes ``once`` seconds for an image, and 10 ms for a view of it."""
    lengths = []

    def on_this_machine(config, source, seconds, training=None):
        lengths.append(training)
        step = config.batch_size * (once + 0.01 * config.num_views)
        return Measured(config.batch_size, 1, step, 0, 0, 0, 0.0, Besides())

    monkeypatch.setattr(plan_module, "measure", on_this_machine)
    asked = PlanConfig(data="x", hours=1)
    choices = choose_start(asked)
    choices.settings |= SIZES | {"batch_size": 32}
    first = on_this_machine(choices.config(asked), None, 15.0, 60.0)
    chosen = plan_module._measure_views(choices, asked, None, first, 60.0)
    config = choices.config(asked, minutes=1.0)
    assert (config.num_views, config.batch_size, chosen.batch_size) == (views, batch_size, batch_size)
    assert ("--num-views 4" in command_of(choices, asked, config)) == (views == 4)
    assert lengths == ([60.0, None, 60.0] if views == 4 else [60.0, None])  # the choice is rehearsed, too


def test_an_image_size_alone_is_enough(image_folder, quick):
    """It is measured with an encoder whose settings are those of a run: tokens of 16 pixels are too few for others."""
    found = dmjd.plan(data=str(image_folder), hours=1e-6, device="cpu", num_workers=0, img_size=32)
    assert "--encoder vit_tiny_patch4 --img-size 32" in found["command"]


def test_a_plan_of_almost_no_time(image_folder, quick):
    """Its numbers are those of the given batch, and each warning comes once."""
    size = {"encoder": "vit_tiny_patch8", "img_size": 32, "batch_size": 24}
    found = dmjd.plan(data=str(image_folder), hours=1e-7, device="cpu", num_workers=0, **size)
    assert "--minutes 2.7e-06" in found["command"]
    expected = found["expected"]
    assert expected["seconds_per_step"] == pytest.approx(24 / expected["images_per_s"])
    assert len(found["warnings"]) == len(set(found["warnings"])) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hours", "1"], "say what to train on"),
        (["--data", "digits"], "say how long the run may take"),
        (["--data", "digits", "--hours", "0"], "hours must be greater than 0"),
        (["--data", "nowhere", "--hours", "1"], "nowhere"),
        (["--data", "digits", "--hours", "1", "--teacher-size", "128"], "--teacher-size has no use without --teacher"),
        (["--data", "digits", "--hours", "1", "--batch-size", "2000000"], "--batch-size must be at most 1"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
