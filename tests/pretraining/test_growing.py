"""Runs whose set grows: what joins is trained on, and a stopped or killed run ends with the same bits."""

import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from support import TINY, TINY_FIELDS, assert_same_bits, metrics, mistake

import dmjd
from dmjd.config import recipes
from dmjd.data.growth import GROWTH_FILE, read_segments

FIELDS = TINY_FIELDS | {"batch_size": 4, "held_out": 2, "num_workers": 0, "steps": 8, "checkpoint_every": 3}


def add(folder, *names, sizes=3):
    folder.mkdir(exist_ok=True)
    for name in names:
        size = (40 + ord(name) % sizes, 36, 3)  # of several sizes: such a set is not held in memory
        pixels = np.random.default_rng(ord(name)).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def grow(folder, step, stop_at=None):
    """A hook that adds images after a step, and stops the run after another."""

    def hook(report):
        if report.state.step == step:
            add(folder, "u", "v", "w", "x")
        if report.state.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of ten images that four join while epoch 0 lasts, of a finished run and of one that was stopped."""
    root = tmp_path_factory.mktemp("growing")
    for name, stop_at in (("whole", None), ("stopped", 5)):
        data = add(root / f"{name}-set", *"abcdefghij")
        config = recipes.folder(str(data), str(root / name), data_may_grow=True, **FIELDS)
        result = dmjd.pretrain(config, hooks=[grow(data, 1, stop_at)])
        assert result.finished == (stop_at is None)
    return root


def test_a_stopped_run_ends_with_the_same_bits(runs, tmp_path, capsys):
    for given in ({"data_may_grow": True, "num_workers": 2}, {}):  # without the flag nothing else joins
        out, data = (
            shutil.copytree(runs / name, tmp_path / f"{len(given)}-{name}") for name in ("stopped", "stopped-set")
        )
        if not given:
            add(data, "z")
        config = recipes.folder(str(data), str(out), **FIELDS | given)
        assert dmjd.pretrain(config).finished
        assert_same_bits(runs / "whole", out)
        assert metrics(out)[-1]["epoch"] == 4  # in epochs of the images that there were at first
    assert [len(segment.paths) for segment in read_segments(runs / "whole" / GROWTH_FILE)] == [4, 0]


def test_images_that_join_change_the_run(runs, tmp_path):
    data = add(tmp_path / "set", *"abcdefghij")
    assert dmjd.pretrain(recipes.folder(str(data), str(tmp_path / "run"), **FIELDS)).finished
    assert not (tmp_path / "run" / GROWTH_FILE).exists()
    with pytest.raises(AssertionError):
        assert_same_bits(runs / "whole", tmp_path / "run")


def test_a_set_to_which_nothing_joins_trains_as_without_the_flag(tmp_path):
    data, fields = add(tmp_path / "set", *"abcdefghij"), FIELDS | {"steps": 4}
    for name in ("plain", "growing"):
        config = recipes.folder(str(data), str(tmp_path / name), data_may_grow=name == "growing", **fields)
        dmjd.pretrain(config)
    assert_same_bits(tmp_path / "plain", tmp_path / "growing")


@pytest.mark.parametrize("began_with_it", [True, False])
def test_a_set_that_fits_into_memory_may_be_resumed_with_or_without_the_flag(began_with_it, tmp_path):
    """It is held in memory without the flag, and read by workers with it."""
    data = add(tmp_path / "set", *"abcdefghijklmnop", sizes=1)
    fields = FIELDS | {"steps": 6}
    whole, stopped = (
        recipes.folder(str(data), str(tmp_path / name), data_may_grow=began_with_it, **fields)
        for name in ("whole", "stopped")
    )
    assert dmjd.pretrain(whole).finished
    assert not dmjd.pretrain(stopped, hooks=[grow(data, None, stop_at=2)]).finished
    assert not (tmp_path / "stopped" / GROWTH_FILE).exists()  # before the first epoch that could have more
    assert dmjd.pretrain(stopped.replace(data_may_grow=not began_with_it)).finished
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_begun_without_the_flag_may_grow_later(tmp_path):
    data = add(tmp_path / "set", *"abcdefghij")
    config = recipes.folder(str(data), str(tmp_path / "run"), **FIELDS)
    assert not dmjd.pretrain(config, hooks=[grow(data, 2, stop_at=3)]).finished  # in the middle of epoch 1
    assert dmjd.pretrain(config.replace(data_may_grow=True)).finished
    assert [(s.epoch, len(s.paths)) for s in read_segments(tmp_path / "run" / GROWTH_FILE)] == [(2, 4), (3, 0)]


def test_a_record_that_is_gone_is_named(runs, tmp_path):
    out, data = (shutil.copytree(runs / name, tmp_path / name) for name in ("stopped", "stopped-set"))
    (out / GROWTH_FILE).unlink()
    for flag in (True, False):
        config = recipes.folder(str(data), str(out), data_may_grow=flag, **FIELDS)
        with pytest.raises(ValueError, match=f"{GROWTH_FILE} is missing or cut short: 4 images"):
            dmjd.pretrain(config)


def test_sets_that_do_not_grow_are_refused(tmp_path, capsys):
    text = mistake(capsys, "pretrain", "--data", "digits", "--out", tmp_path / "run", "--data-may-grow", *TINY)
    assert "--data-may-grow is for folders and lists of images; digits is" in text
    assert not (tmp_path / "run").exists()


def test_unreadable_images_that_joined_may_be_removed(tmp_path):
    """As those of the start: what ended the run goes on."""
    data, out = add(tmp_path / "set", *"abcdefghij"), tmp_path / "run"

    def damage(report):
        if report.state.step == 1:
            for number in range(11):
                (data / f"half{number}.png").write_bytes(b"nothing")

    config = recipes.folder(str(data), str(out), data_may_grow=True, **FIELDS | {"steps": 12, "checkpoint_every": 1})
    with pytest.raises(ValueError, match="11 of 21 images can't be read"):
        dmjd.pretrain(config, hooks=[damage])
    for half in data.glob("half*"):
        half.unlink()
    assert dmjd.pretrain(config).finished


def test_the_share_that_may_be_unreadable_is_one_of_all_images(tmp_path):
    """A set that grows a hundredfold holds more damaged images than it began with."""
    data = add(tmp_path / "set", *"abcdefghij")

    def many(report):
        if report.state.step == 1:
            for number in range(30):
                name = data / f"later{number}.png"
                name.write_bytes(b"nothing") if number < 6 else shutil.copy(data / "a.png", name)

    fields = FIELDS | {"steps": 20, "data_may_grow": True}
    config = recipes.folder(str(data), str(tmp_path / "run"), max_unreadable=0.3, **fields)  # 12 of 40
    assert len(dmjd.pretrain(config, hooks=[many]).unreadable) == 6
    for file in data.glob("later*"):
        file.unlink()
    config = recipes.folder(str(data), str(tmp_path / "strict"), max_unreadable=0.1, **fields)
    with pytest.raises(ValueError, match="of 40 images can't be read, more than max_unreadable = 4"):
        dmjd.pretrain(config, hooks=[many])
