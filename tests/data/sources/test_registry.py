"""Opening a source by path or name: precedence, splits, errors, and a new kind of source."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from image_sets import Arrays, save, write_table
from support import TINY_FIELDS

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources import registry
from dmjd.data.sources.digits import DigitsSource
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.registry import absolute, align_labels, has_split, open_source
from dmjd.data.sources.tables import ParquetSource
from dmjd.pretraining.run import pretrain


class Toy(Arrays):
    """A kind of source that is not part of the package."""

    names = ("toy",)
    kind = "a toy"
    label_option = "folder"

    @classmethod
    def from_data(cls, data, options):
        return cls(64 if options.split == "train" else 8, dtype=np.uint8)


@pytest.fixture
def toy_in_the_table(monkeypatch):
    monkeypatch.setattr(registry, "SOURCES", (Toy, *registry.SOURCES))


@pytest.mark.usefixtures("toy_in_the_table")
def test_a_new_kind_of_source_needs_a_class_and_a_line(tmp_path):
    assert len(open_source("toy")) == 64
    assert len(open_source("toy", split="test")) == 8
    assert has_split("toy", "test")
    assert absolute("toy") == "toy"
    with pytest.raises(ValueError, match="did you mean toy"):
        open_source("toyy")
    with pytest.raises(ValueError, match="labels 'column' does not fit toy, which is a toy: pass --labels folder"):
        open_source("toy", labels="column")
    with pytest.raises(ValueError, match="toy holds no images with masks"):
        open_source("toy", masks=True)
    config = PretrainConfig(data="toy", out=str(tmp_path / "run"), epochs=None, steps=1, batch_size=4, **TINY_FIELDS)
    pretrain(config)
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_precedence(tmp_path, monkeypatch):
    """Names win over paths, and tables over images in the same folder."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "digits" / "1.png")
    with pytest.warns(UserWarning, match="not the folder digits/"):
        assert isinstance(open_source("digits", split="test"), DigitsSource)
    assert isinstance(open_source("./digits"), FolderSource)
    assert absolute("digits") == "digits"
    assert absolute("./digits") == str(tmp_path / "digits")
    assert absolute("user/set-of-the-hub") == "user/set-of-the-hub"
    write_table(tmp_path / "digits" / "x.parquet", [1])
    assert isinstance(open_source("./digits"), ParquetSource)


def test_splits_may_be_of_different_kinds(tmp_path):
    write_table(tmp_path / "train" / "x.parquet", [1, 2])
    save(tmp_path / "test" / "1.png")
    assert isinstance(open_source(tmp_path), ParquetSource)
    assert isinstance(open_source(tmp_path, split="test"), FolderSource)


def test_suggestions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for wrong, right in [("imagse", "images"), ("cifr10", "cifar10"), ("digit", "digits")]:
        with pytest.raises(ValueError, match=f"there is no {wrong}: did you mean {right}"):
            open_source(wrong)
    for wrong in ["/nowhere/at all", "nothing.parquet", "images/no", "~/not here/x"]:
        with pytest.raises(ValueError, match=f"there is no {wrong}"):
            open_source(wrong)


def test_single_file(tmp_path):
    save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="is a single file: give the folder"):
        open_source(tmp_path / "one.png")
    (tmp_path / "list.xlsx").write_text("one.png,cat")
    with pytest.raises(ValueError, match=r"list\.xlsx is a list or table of a kind that is not supported: save it as"):
        open_source(tmp_path / "list.xlsx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "vall"}, "split must be one of train, val, test"),
        ({"labels": "colum"}, "labels must be one of none, folder, column"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"labels": "column"}, "which is a folder of images: pass --labels folder"),
    ],
)
def test_options(tmp_path, options, message):
    save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, **options)


def test_splits(tmp_path):
    for name in ["train/a/1.png", "train/b/2.png", "val/b/3.png"]:
        save(tmp_path / name)
    assert has_split(tmp_path, "test")
    train, test = (open_source(tmp_path, split=s, labels="folder") for s in ("train", "test"))
    assert (len(train), len(test)) == (2, 1)
    assert test.labels.tolist() == [0]
    assert align_labels(train, test).tolist() == [1]
    save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match="1 images next to"):
        open_source(tmp_path)


def test_a_class_named_train_is_not_a_split(tmp_path):
    for name in ["train/1.png", "bus/2.png"]:
        save(tmp_path / name)
    assert not has_split(tmp_path, "test")
    assert open_source(tmp_path, labels="folder").classes == ["bus", "train"]
    with pytest.raises(ValueError, match=r"no test part .*--test-data"):
        open_source(tmp_path, split="test")


def test_unknown_test_class(tmp_path):
    for name in ["train/a/1.png", "test/c/3.png"]:
        save(tmp_path / name)
    train, test = (open_source(tmp_path, split=s, labels="folder") for s in ("train", "test"))
    with pytest.raises(ValueError, match="does not have: c"):
        align_labels(train, test)
    with pytest.raises(ValueError, match="has no labels"):
        align_labels(train, open_source(tmp_path, split="test"))


def test_val_is_a_split_of_its_own_beside_test(tmp_path):
    for number, name in enumerate(["Train/a/1.png", "VAL/b/2.png", "TEST/b/3.png"]):
        save(tmp_path / name, number)
    found = {split: open_source(tmp_path, split=split) for split in ("train", "val", "test")}
    assert {split: Path(one.name).name for split, one in found.items()} == {
        "train": "Train",
        "val": "VAL",
        "test": "TEST",
    }
    assert {split: one.split for split, one in found.items()} == {split: split for split in found}
    shutil.rmtree(tmp_path / "TEST")
    assert [open_source(tmp_path, split=split).split for split in ("val", "test")] == ["val", "val"]
    shutil.move(tmp_path / "VAL", tmp_path / "test")
    with pytest.raises(ValueError, match=r"has no val part .*another --split than val"):
        open_source(tmp_path, split="val")
    for name in ("digits", "cifar10"):
        assert not has_split(name, "val")
        with pytest.raises(ValueError, match=f"{name} has no val part"):
            open_source(name, split="val")


def test_val_of_tables(tmp_path):
    for number, name in enumerate(["train", "validation-0-of-1", "test"]):
        write_table(tmp_path / f"{name}.parquet", [number] * (number + 1))
    found = [open_source(tmp_path, split=split) for split in ("train", "val", "test")]
    assert [len(one) for one in found] == [1, 2, 3]
    assert [one.split for one in found] == ["train", "val", "test"]
    (tmp_path / "test.parquet").unlink()
    assert (open_source(tmp_path, split="test").split, len(open_source(tmp_path, split="test"))) == ("val", 2)
