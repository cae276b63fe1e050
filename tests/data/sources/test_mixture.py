"""Several sources as one set: its images, labels, identity, lists, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from image_sets import first_values, save, write_table

from dmjd.data.cache import load_to_memory
from dmjd.data.order import Part
from dmjd.data.recheck import Began, check_moved, moved_reports, recheck
from dmjd.data.sources.mixture import MixtureSource, listing_of
from dmjd.data.sources.registry import absolute_sources, has_split, open_source
from dmjd.data.train_loader import TrainLoader
from dmjd.warning import DMJDWarning


@pytest.fixture
def sets(tmp_path):
    """A folder of 9 images of two classes, a table of 4, and a list of 2; gray values tell them apart."""
    for i in range(9):
        save(tmp_path / "A" / ("cats" if i % 2 else "dogs") / f"{i}.png", i)
    write_table(tmp_path / "B" / "train.parquet", [100, 101, 102, 103], label=[0, 1, 0, 1])
    save(tmp_path / "C" / "x.png", 200)
    save(tmp_path / "C" / "y.png", 201)
    (tmp_path / "list.txt").write_text("C/x.png\nC/y.png\n")
    return [str(tmp_path / name) for name in ("A", "B", "list.txt")]


def test_images_are_those_of_all_sources(sets, tmp_path):
    A, B, _ = sets
    source = open_source([A, f"{B}:0.3", tmp_path / "list.txt"])
    assert isinstance(source, MixtureSource)
    assert first_values(source) == [1, 3, 5, 7, 0, 2, 4, 6, 8, 100, 101, 102, 103, 200, 201]
    assert source.parts == (Part(9), Part(4, 0.3), Part(2))
    assert source.describe(10) == f"row 1 of {B}/train.parquet"
    assert source.describe(14) == f"{tmp_path}/C/y.png"
    for wrong in (-1, 15):
        with pytest.raises(IndexError):
            source.stored(wrong)
    assert load_to_memory(source) is not None  # all of one size
    save(tmp_path / "C" / "y.png", 201, (30, 20))
    assert load_to_memory(source) is None
    assert [line.split(": ")[1] for line in source.lines()] == [
        "9 images, 57.3 % of the samples, each image 0.955 times an epoch",
        "4 images, 30 % of the samples, each image 1.12 times an epoch",
        "2 images, 12.7 % of the samples, each image 0.955 times an epoch",
    ]


def test_a_source_in_another_is_a_warning(sets):
    with pytest.warns(DMJDWarning, match=r"cats lies in .*A: its images may count for both"):
        open_source([sets[0], f"{sets[0]}/cats:0.3"])


def test_one_source_in_a_list_is_that_source(sets):
    assert type(open_source(sets[:1])) is type(open_source(sets[0]))
    assert open_source(sets[:1]).fingerprint() == open_source(sets[0]).fingerprint()


@pytest.mark.parametrize("size", [None, (30, 20)])
def test_batches_hold_the_share_of_each_source(sets, tmp_path, size):
    """From memory and from files alike."""
    A, _, C = sets
    if size is not None:
        save(tmp_path / "A" / "cats" / "1.png", 1, size)
    source = open_source([A, f"{C}:0.25"])
    loader = TrainLoader(source, img_size=(5, 6), batch_size=8, num_workers=0)
    assert loader.in_memory == (size is None)
    batches = loader.batches()
    seen = torch.stack([next(batches).images[:, 0, 2, 2] for _ in range(9)])
    assert ((seen >= 200).sum(1) == 2).all()
    counts = torch.bincount(seen.flatten().long())
    assert counts[:9].tolist() == [6] * 9
    assert counts[200:].tolist() == [9, 9]


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_replaced_by_others_of_their_source(sets, tmp_path, in_memory):
    A, _, C = sets
    if not in_memory:
        save(tmp_path / "A" / "cats" / "1.png", 1, (30, 20))
    (tmp_path / "C" / "x.png").write_bytes(b"no image")
    loader = TrainLoader(open_source([A, f"{C}:0.25"]), img_size=(5, 6), batch_size=8, num_workers=0)
    assert loader.in_memory == in_memory
    batches = loader.batches()
    for _ in range(9):
        assert (next(batches).images[:, 0, 2, 2] == 201).sum() == 2


def test_classes_are_joined_by_name(sets, tmp_path):
    A, _, _ = sets
    for i, name in enumerate(["cats", "birds"]):
        save(tmp_path / "D" / name / "a.png", i)
    source = open_source([A, str(tmp_path / "D")], labels="folder")
    assert source.classes == ["birds", "cats", "dogs"]
    assert [source.classes[i] for i in source.labels] == ["cats"] * 4 + ["dogs"] * 5 + ["birds", "cats"]
    assert open_source([A, str(tmp_path / "D")]).labels is None
    assert open_source([A, "digits"]).labels is None  # of which one has some
    for labels in ("folder", "column"):  # of each what it has
        both = open_source(sets[:2], labels=labels)
        assert both.classes == ["0", "1", "cats", "dogs"]
        assert both.labels.tolist() == [2] * 4 + [3] * 5 + [0, 1, 0, 1]


def test_a_test_split_is_that_of_the_sources_that_have_one(sets, tmp_path):
    A, B, C = sets
    shutil.copytree(A, tmp_path / "D" / "train")
    save(tmp_path / "D" / "test" / "t.png", 50)
    write_table(tmp_path / "B" / "test.parquet", [60])
    D = str(tmp_path / "D")
    assert has_split([A, D], "test")
    assert not has_split([A, C], "test")
    assert first_values(open_source([A, D, f"{B}:0.2"], split="test")) == [50, 60]
    assert first_values(open_source([A, D], split="test")) == [50]
    assert len(open_source([C, D])) == 2 + 9
    with pytest.raises(ValueError, match="no test part"):
        open_source([A, C], split="test")


def test_what_is_refused(sets, tmp_path):
    A, B, C = sets
    (tmp_path / "empty").mkdir()
    for i in range(3):
        (tmp_path / "bands").mkdir(exist_ok=True)
        np.save(tmp_path / "bands" / f"{i}.npy", np.zeros((8, 8, 5), np.uint8))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for given, message in {
        (A, f"{B}:0"): "the weight of .*B in --data must be a share",
        (A, f"{B}:0.7", f"{C}:0.7"): "sum to 1.4, which leaves no samples for .*A",
        (A, A): "names .*A twice",
        (f"{A}:0.3",): "single set, for which the weight 0.3 means nothing",
        f"{A}:0.3": "single set, for which the weight 0.3 means nothing",
        (A, str(tmp_path / "empty")): "no images found in .*empty",
        (A, str(tmp_path / "missing")): "there is no .*missing",
        (A, str(tmp_path / "bands")): "none of the 3 images of .*bands that were tried can be read, .*0.npy for one: ",
        (A, str(tmp_path / "broken")): "none of the 1 images of .*broken that were tried can be read",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            open_source(given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="images with masks come from one set, got several"):
        open_source(sets, masks=True)
    with pytest.warns(DMJDWarning, match=r"sum to 0\.8, not 1: each is divided by that"):
        open_source([f"{A}:0.5", f"{C}:0.3"])


def test_each_source_keeps_its_list(sets, tmp_path):
    listing = tmp_path / "files.txt"
    before = open_source(sets)
    before.save_listing(listing)
    assert not listing.exists()
    assert [listing_of(listing, i).exists() for i in range(3)] == [True, False, True]  # a table needs none
    names = [before.describe(i) for i in range(len(before))]
    save(tmp_path / "A" / "cats" / "new.png", 77)
    (tmp_path / "list.txt").write_text("C/y.png\n")
    again = open_source(sets, listing=listing)
    assert [again.describe(i) for i in range(len(again))] == names
    assert len(open_source(sets)) == len(before)
    assert again.fingerprint() == before.fingerprint()
    assert again.changes(before.fingerprint()).names == []
    assert open_source(sets[:2]).changes(before.fingerprint()) is None


def test_changes_are_named_and_a_small_source_is_not_overlooked(sets, tmp_path):
    listing = tmp_path / "files.txt"
    before = open_source(sets)
    before.save_listing(listing)
    began, warnings = Began.of(before), []
    assert set(began.content) == set(range(15))
    save(tmp_path / "A" / "cats" / "3.png", 3, (9, 9))
    recheck(open_source(sets, listing=listing), began, [], warnings.append)
    assert len(warnings) == 1
    assert "3.png" in warnings[0]
    for name in ("x", "y"):  # 2 of 15 images, but all of their source
        save(tmp_path / "C" / f"{name}.png", 9)
    with pytest.raises(ValueError, match=r"the images in .*list\.txt are not those .*: of 2 compared, 2 have changed"):
        recheck(open_source(sets, listing=listing), began, [], warnings.append)
    write_table(tmp_path / "B" / "train.parquet", [1, 2, 3])
    with pytest.raises(ValueError, match=r"the images in .*B are not those this run began with"):
        recheck(open_source(sets, listing=listing), began, [], warnings.append)


def test_sources_may_move_one_by_one(sets, tmp_path):
    A, B, C = sets
    listing = tmp_path / "files.txt"
    before = open_source(sets)
    before.save_listing(listing)
    began = Began.of(before)
    shutil.move(A, tmp_path / "moved")
    now = [str(tmp_path / "moved"), B, C]
    check_moved(open_source(now, listing=listing), began, [], "A, B, list.txt")
    assert moved_reports([(f"{A}/cats/1.png", "x"), ("row 1 of t", "y")], sets, now) == [
        (f"{tmp_path}/moved/cats/1.png", "x"),
        ("row 1 of t", "y"),
    ]
    save(tmp_path / "moved" / "cats" / "3.png", 9, (9, 9))
    with pytest.raises(ValueError, match=r"moved: of 9 images compared, 1 differ .* give --data A, B, list\.txt"):
        check_moved(open_source(now, listing=listing), began, [], "A, B, list.txt")


def test_a_damaged_list_names_its_file(sets, tmp_path):
    listing = tmp_path / "files.txt"
    open_source(sets).save_listing(listing)
    listing_of(listing, 2).write_text(json.dumps({"paths": []}))
    with pytest.raises(ValueError, match=r"files\.3\.txt is not a list of images"):
        open_source(sets, listing=listing)


def test_a_source_of_which_nothing_is_left(sets):
    source = open_source(sets)
    lost = [(source.describe(i), "no such file") for i in (13, 14)]
    source.check_remains(lost[:1] + [(source.describe(i), "damaged") for i in range(8)])
    with pytest.raises(ValueError, match=r"no image of .*list\.txt can be read any more, .*x\.png for one: no such"):
        source.check_remains(lost)


def test_paths_are_stored_absolute(sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.3").mkdir()
    assert absolute_sources(("A", "B:0.30", "a:0.3", "digits:0.1", "user/name")) == (
        str(tmp_path / "A"),
        f"{tmp_path}/B:0.3",
        f"{tmp_path}/a:0.3/",
        "digits:0.1",
        "user/name",
    )
    assert absolute_sources("A") == str(tmp_path / "A")
