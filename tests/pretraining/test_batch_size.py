"""The default batch size and base learning rate, and how a resumed run keeps those it began with."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import TINY_FIELDS

import dmjd
import dmjd.pretraining.batch_size
from dmjd.config import recipes
from dmjd.pretraining.batch_size import default_batch_size, resolve_batch_size
from dmjd.pretraining.shard_window import keep_recorded

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("images", "cpu", "minutes", "expected"),
    [
        (10**6, False, None, 256),
        (10**6, False, 2.0, 256),
        (10**6, True, None, 64),
        (10**6, True, 60.0, 64),
        (10**6, True, 10.0, 32),
        (300, False, None, 30),
        (100, True, None, 16),
        (5, True, 1.0, 5),
    ],
)
def test_the_default_depends_on_set_time_and_machine(images, cpu, minutes, expected):
    assert default_batch_size(images, cpu=cpu, minutes=minutes) == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(16, 3000), st.booleans())
def test_the_default_is_divided_among_processes_and_is_recorded(processes, accumulate, images, cpu):
    config, device = recipes.folder(img_size=128, accumulate=accumulate), CPU if cpu else torch.device("cuda")
    resolved, batch_size = resolve_batch_size(config, images, processes, device)
    assert resolved.batch_size == batch_size <= min(256, images)
    assert batch_size % (processes * accumulate) == 0
    assert resolve_batch_size(resolved, images, processes, device) == (resolved, batch_size)


def test_recipes_that_set_a_batch_size_keep_it():
    for config in (recipes.digits(), recipes.adapt(init="runs/mine")):
        assert resolve_batch_size(config, 10**4, 1, CPU) == (config, 64)


def test_a_resumed_run_keeps_the_batch_size_it_began_with(image_folder, tmp_path, monkeypatch):
    """Also where the default is another one, such as on a GPU."""
    fields = TINY_FIELDS | {"num_workers": 0}
    config = recipes.dmjd(image_folder, str(tmp_path / "run"), **fields, steps=2)
    dmjd.pretrain(config)
    file = tmp_path / "run" / "config.json"
    assert json.loads(file.read_text())["batch_size"] == 16
    monkeypatch.setattr(dmjd.pretraining.batch_size, "LEAST_DEFAULT", 8)
    assert keep_recorded(config, tmp_path / "other").batch_size is None
    with pytest.raises(ValueError, match="batch_size: 16 -> 8"):
        dmjd.pretrain(config.replace(batch_size=8))
    again = dmjd.pretrain(config.replace(steps=4))
    assert json.loads(file.read_text())["batch_size"] == 16
    assert again.step == 4
    # A run of a former version recorded no default; it was 256, or the whole set.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"batch_size": None}))
    assert keep_recorded(config, tmp_path / "run").batch_size == 256
    dmjd.pretrain(config.replace(steps=4, batch_size=256))  # the same
    with pytest.raises(ValueError, match="batch_size: 256 -> 16"):
        dmjd.pretrain(config.replace(steps=4, batch_size=16))


@pytest.mark.parametrize(("batch_size", "rate"), [(16, 2.4e-2), (256, 6e-3), (1024, 3e-3)])
def test_the_base_learning_rate_of_muon_follows_the_batch(batch_size, rate):
    """So that the learning rate of a step grows with its square root. AdamW has the paper's from its batch on."""
    muon = recipes.dmjd(optimizer="muon", batch_size=batch_size)
    assert resolve_batch_size(muon, 10**4, 1, CPU)[0].blr == pytest.approx(rate)
    paper = resolve_batch_size(recipes.dmjd(batch_size=batch_size), 10**4, 1, CPU)[0].blr
    assert paper == pytest.approx(6e-4 * max(1, (512 / batch_size) ** 0.5))
    assert resolve_batch_size(muon.replace(blr=1e-3), 10**4, 1, CPU)[0].blr == 1e-3


def test_a_resumed_run_keeps_the_base_learning_rate_it_began_with(image_folder, tmp_path):
    config = recipes.dmjd(image_folder, str(tmp_path / "run"), **TINY_FIELDS | {"num_workers": 0, "steps": 1})
    dmjd.pretrain(config.replace(blr=None, optimizer="muon"))
    file = tmp_path / "run" / "config.json"
    recorded = json.loads(file.read_text())
    assert recorded["blr"] == pytest.approx(6e-3 * (256 / recorded["batch_size"]) ** 0.5)
    file.write_text(json.dumps(recorded | {"blr": 3e-3}))  # as by the default of a former version
    longer = config.replace(blr=None, optimizer="muon", steps=2)
    with pytest.raises(ValueError, match=r"blr: 0\.003 -> 0\.001"):
        dmjd.pretrain(longer.replace(blr=1e-3))
    assert dmjd.pretrain(longer).step == 2
    assert json.loads(file.read_text())["blr"] == 3e-3


@pytest.mark.parametrize(
    ("accumulate", "processes", "cure"),
    [
        (2, 3, "multiple of 6; a run that is resumed keeps its own: start it on 1, 2, 4 or 8 process(es)"),
        (16, 3, "multiple of 48; a run that is resumed keeps its own: start it on 1 process(es)"),
    ],
)
def test_processes_that_do_not_divide_a_recorded_batch_are_told_which_do(accumulate, processes, cure):
    config = recipes.folder(batch_size=16, accumulate=accumulate)
    with pytest.raises(ValueError, match=rf"batch size 16 .* cannot be divided .* {re.escape(cure)}$"):
        resolve_batch_size(config, 1000, processes, CPU)
