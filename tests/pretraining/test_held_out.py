"""Held-out images: never trained on, the same for every run, and their loss is that of training images."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY_FIELDS, metrics

import dmjd
from dmjd.config import recipes
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.held_out import HeldOutLoss, hold_out
from dmjd.runs.build import build_model

FIELDS = TINY_FIELDS | {"batch_size": 6, "num_workers": 0}


def names(source):
    return [Path(source.describe(i)).name for i in range(len(source))]


def test_a_run_trains_as_if_the_held_out_images_were_not_there(image_folder, tmp_path):
    """Same bits as a run on a folder without them."""
    config = recipes.folder(str(image_folder), str(tmp_path / "all"), steps=8, held_out=5, **FIELDS)
    _, trained, held = hold_out(config, open_source(str(image_folder)))
    rest = shutil.copytree(image_folder, tmp_path / "rest")
    for file in rest.rglob("*"):
        if file.name in names(held):
            file.unlink()
    assert len(held) == 5
    assert names(open_source(str(rest))) == names(trained)
    runs = [config, config.replace(data=str(rest), out=str(tmp_path / "without"), held_out=0)]
    losses = [[m["loss"] for m in metrics(dmjd.pretrain(run).path)] for run in runs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("num_images", "expected"), [(24, 0), (49, 0), (50, 1), (12_000, 240), (200_000, 2000)])
def test_the_default_is_two_percent_up_to_2000(num_images, expected):
    class Numbered:
        name, in_chans, value_range, classes, labels, parts, split = "numbered", 3, None, [], None, (), "train"
        windows = invalid = None

        def __len__(self):
            return num_images

    config, trained, held = hold_out(recipes.dmjd(), Numbered())
    assert config.held_out == expected
    assert len(trained) == num_images - expected
    assert (held is None) == (expected == 0)
    if held is not None:  # all images, each in one part
        assert np.array_equal(np.sort(np.concatenate([trained.rows, held.rows])), np.arange(num_images))
        again = hold_out(recipes.dmjd(seed=1), Numbered())
        assert np.array_equal(again[2].rows, held.rows)  # also with another seed


def test_the_loss_is_that_of_the_model_and_repeats(image_folder):
    config = recipes.folder(str(image_folder), steps=1, held_out=12, **FIELDS)
    config, _, held = hold_out(config, open_source(str(image_folder)))
    model, preprocess = build_model(config), Preprocess(config.size)
    measure = HeldOutLoss(held, config, preprocess)
    loss = measure(model)
    assert set(loss) == {"held_out_loss", "held_out_mim", "held_out_vis"}
    assert loss["held_out_loss"] == pytest.approx(loss["held_out_mim"] + config.theta * loss["held_out_vis"], rel=1e-5)
    assert measure(model) == loss
    assert model.training
    torch.manual_seed(7)  # neither masks nor crops depend on the global generator
    assert HeldOutLoss(held, config, preprocess)(model) == loss


@pytest.mark.parametrize(("count", "used"), [(1, 1), (64, 64), (100, 100), (127, 126), (129, 129)])
def test_nearly_all_held_out_images_are_used(count, used, image_folder):
    config = recipes.folder(str(image_folder), steps=1, **FIELDS)
    images = open_source(str(image_folder))
    held = SubsetSource(images, np.arange(count) % len(images))
    measure = HeldOutLoss(held, config, Preprocess(config.size))
    measure.read()
    assert measure.num_images == used == sum(len(batch.images) for batch in measure._batches)


def test_measuring_changes_no_bit_of_the_training(image_folder, tmp_path):
    config = recipes.folder(str(image_folder), steps=5, held_out=4, drop_path=0.2, **FIELDS)
    runs = [dmjd.pretrain(config.replace(out=str(tmp_path / str(every)), eval_every=every)) for every in (0, 1)]
    losses = [[m["loss"] for m in metrics(run.path) if "loss" in m] for run in runs]
    assert losses[0] == losses[1]
    assert len([m for m in metrics(runs[1].path) if "held_out_loss" in m]) == 5
    assert not [m for m in metrics(runs[0].path) if "held_out_loss" in m]
    assert runs[1].metrics["held_out_loss"] == metrics(runs[1].path)[-1]["held_out_loss"]


def test_held_out_images_that_cannot_be_read_are_listed(image_folder, tmp_path, capsys):
    """They are never trained on: the measurement finds them."""
    data, run = shutil.copytree(image_folder, tmp_path / "data"), tmp_path / "run"
    config = recipes.folder(str(data), str(run), steps=2, held_out=6, **FIELDS | {"eval_every": 1})
    _, _, held = hold_out(config, open_source(str(data)))
    damaged = data / held.describe(2).removeprefix(f"{data}/")
    damaged.write_bytes(b"no image")
    assert dmjd.pretrain(config).unreadable[0][0] == str(damaged)
    assert (run / "unreadable.txt").read_text().startswith(f"{damaged}\t")
    assert capsys.readouterr().err.count(f"replaced by another image: {damaged}") == 1
    with pytest.raises(ValueError, match="1 of 24 images can't be read"):
        dmjd.pretrain(config.replace(out=str(tmp_path / "strict"), max_unreadable=0))


def test_all_images_cannot_be_held_out(image_folder, tmp_path):
    count = len(open_source(str(image_folder)))
    config = recipes.folder(str(image_folder), str(tmp_path / "run"), steps=1, held_out=count, **FIELDS)
    with pytest.raises(ValueError, match=rf"--held-out {count} leaves nothing to train on: .* has {count} image"):
        dmjd.pretrain(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_resumed_run_holds_out_what_it_began_with(image_folder, tmp_path):
    config = recipes.folder(str(image_folder), str(tmp_path / "run"), steps=2, held_out=4, **FIELDS)
    dmjd.pretrain(config)
    dmjd.pretrain(config.replace(held_out=None, steps=3))  # not given again
    with pytest.raises(ValueError, match="held_out: 4 -> 3"):
        dmjd.pretrain(config.replace(held_out=3, steps=4))
