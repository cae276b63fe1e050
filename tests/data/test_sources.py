import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmjd.data.eval_loader import EvalLoader, read_all
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.registry import align_labels, has_split, open_source
from dmjd.data.statistics import measure_stats
from dmjd.data.unreadable import UnreadableImages
from dmjd.images.decoding import UnreadableImage
from dmjd.images.preprocess import Preprocess

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test leaves converted tables in the user's cache."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def save(path, value=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, values, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": png(v), "path": None} for v in values])
    pq.write_table(pa.table({"image": images, **{k: pa.array(v) for k, v in columns.items()}}), path, row_group_size=2)


def first_values(source):
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


class TestFolder:
    def test_sorted_nested_and_hidden(self, tmp_path):
        for i, name in enumerate(["b/x.png", "a/z.JPG", "a.png", "a/b/c.bmp", ".hidden/x.png", "a/.x.png"]):
            save(tmp_path / name, i)
        (tmp_path / "notes.txt").write_text("no image")
        source = open_source(tmp_path)
        names = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
        assert names == ["a.png", "a/b/c.bmp", "a/z.JPG", "b/x.png"]
        assert source.labels is None
        assert source.classes == []

    def test_labels_are_first_folders(self, tmp_path):
        for name in ["dog/1.png", "cat/deep/2.png", "cat/3.png"]:
            save(tmp_path / name)
        source = open_source(tmp_path, labels="folder")
        assert source.classes == ["cat", "dog"]
        assert source.labels.tolist() == [0, 0, 1]
        save(tmp_path / "loose.png")
        with pytest.raises(ValueError, match=r"1 of 4 images lie in no class folder, .*loose\.png"):
            open_source(tmp_path, labels="folder")

    def test_spaces_unicode_and_bytes_that_are_no_text(self, tmp_path):
        root = tmp_path / "meine Bilder – 写真"
        save(root / "ü ß.png", 7)
        raw = os.fsencode(root) + b"/\xff.png"
        shutil.copy(os.fsencode(root / "ü ß.png"), raw)
        source = pickle.loads(pickle.dumps(open_source(root)))
        assert first_values(source) == [7, 7]
        assert "\\xff.png" in [source.describe(i) for i in range(2)][1] + source.describe(0)
        assert source.fingerprint()

    def test_listing_is_kept_and_read_again(self, tmp_path):
        for i in range(3):
            save(tmp_path / "set" / f"{i}.png", i)
        listing = tmp_path / "run" / "images.json"
        listing.parent.mkdir()
        first = open_source(tmp_path / "set", listing=listing)
        assert not listing.exists()
        first.save_listing(listing)
        save(tmp_path / "set" / "00.png", 9)
        again = open_source(tmp_path / "set", listing=listing)
        assert first_values(again) == first_values(first) == [0, 1, 2]
        assert again.fingerprint() == first.fingerprint()
        assert open_source(tmp_path / "set").fingerprint() != first.fingerprint()
        assert os.listdir(listing.parent) == ["images.json"]
        listing.write_text("{")
        with pytest.raises(ValueError, match="no list of images: delete it"):
            open_source(tmp_path / "set", listing=listing)

    def test_links_in_a_circle_end(self, tmp_path):
        save(tmp_path / "a" / "1.png")
        (tmp_path / "a" / "back").symlink_to(tmp_path)
        assert len(open_source(tmp_path)) == 1

    def test_empty(self, tmp_path):
        with pytest.raises(ValueError, match=r"no images found in .*; known extensions: \.jpg"):
            open_source(tmp_path)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path):
        save(tmp_path / "open" / "1.png")
        save(tmp_path / "locked" / "2.png")
        (tmp_path / "locked").chmod(0)
        try:
            for folder in (tmp_path, tmp_path / "locked"):
                with pytest.raises(ValueError, match=r"no permission to read the folder .*locked"):
                    open_source(folder)
        finally:
            (tmp_path / "locked").chmod(0o700)

    def test_splits(self, tmp_path):
        for name in ["train/a/1.png", "train/b/2.png", "val/b/3.png"]:
            save(tmp_path / name)
        assert has_split(tmp_path, "test")
        train, test = (open_source(tmp_path, split=s, labels="folder") for s in ("train", "test"))
        assert (len(train), len(test)) == (2, 1)
        assert test.labels.tolist() == [0]
        assert align_labels(train, test).tolist() == [1]
        save(tmp_path / "loose.png")
        with pytest.warns(UserWarning, match="1 images beside"):
            open_source(tmp_path)

    def test_a_class_named_train_makes_no_split(self, tmp_path):
        for name in ["train/1.png", "bus/2.png"]:
            save(tmp_path / name)
        assert not has_split(tmp_path, "test")
        assert open_source(tmp_path, labels="folder").classes == ["bus", "train"]
        with pytest.raises(ValueError, match=r"no test part .*--test-data"):
            open_source(tmp_path, split="test")

    def test_unknown_test_class(self, tmp_path):
        for name in ["train/a/1.png", "test/c/3.png"]:
            save(tmp_path / name)
        train, test = (open_source(tmp_path, split=s, labels="folder") for s in ("train", "test"))
        with pytest.raises(ValueError, match="does not have: c"):
            align_labels(train, test)
        with pytest.raises(ValueError, match="has no labels"):
            align_labels(train, open_source(tmp_path, split="test"))


class TestTables:
    def test_rows_labels_and_names(self, tmp_path):
        write_table(tmp_path / "x.parquet", [10, 20, 30], label=["dog", "cat", "dog"])
        source = pickle.loads(pickle.dumps(open_source(tmp_path / "x.parquet", labels="column")))
        assert first_values(source) == [10, 20, 30]
        assert source.classes == ["cat", "dog"]
        assert source.labels.tolist() == [1, 0, 1]
        assert source.describe(2) == "row 2 of x.parquet"

    def test_folder_of_files_and_splits(self, tmp_path):
        write_table(tmp_path / "data" / "train-00000-of-00002.parquet", [1, 2])
        write_table(tmp_path / "data" / "train-00001-of-00002.parquet", [3])
        write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", [4])
        train, test = (open_source(tmp_path, split=s) for s in ("train", "test"))
        assert (first_values(train), first_values(test)) == ([1, 2, 3], [4])
        assert train.describe(2) == "row 0 of train-00001-of-00002.parquet"
        assert not has_split(tmp_path / "data" / "train-00000-of-00002.parquet", "test")

    def test_unreadable_rows_are_bad_images(self, tmp_path):
        images = pa.array([{"bytes": png(1)}, {"bytes": b"no image"}, {"bytes": None}])
        pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
        source = open_source(tmp_path / "x.parquet")
        assert source.read(0).shape == (5, 6, 3)
        for row in (1, 2):
            with pytest.raises(UnreadableImage, match=f"row {row} of x.parquet"):
                source.read(row)

    def test_binary_column_and_paths(self, tmp_path):
        pq.write_table(pa.table({"img": pa.array([png(5)])}), tmp_path / "x.parquet")
        assert first_values(open_source(tmp_path / "x.parquet")) == [5]
        save(tmp_path / "p" / "one.png", 8)
        images = pa.array(
            [{"bytes": None, "path": "one.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        )
        pq.write_table(pa.table({"image": images}), tmp_path / "p" / "y.parquet")
        assert first_values(open_source(tmp_path / "p" / "y.parquet")) == [8]

    def test_mistakes(self, tmp_path):
        write_table(tmp_path / "x.parquet", [1], other=[2])
        pq.write_table(pa.table({"a": [1]}), tmp_path / "plain.parquet")
        write_table(tmp_path / "holes.parquet", [1, 2], label=[None, 3])
        (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:50])
        for name, labels, message in [
            ("x", "column", "no label column .*; it has image, other"),
            ("x", "folder", "which is a table: pass --labels column"),
            ("plain", "none", "no column of encoded images .*; it has a"),
            ("holes", "column", "some rows have no label in column 'label'"),
            ("cut", "none", "can't be read as parquet"),
        ]:
            with pytest.raises(ValueError, match=message):
                open_source(tmp_path / f"{name}.parquet", labels=labels)

    @pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="the real data is not here")
    def test_cifar10(self):
        train, test = (open_source(REAL / "cifar10", split=s, labels="column") for s in ("train", "test"))
        assert (len(train), len(test)) == (50_000, 10_000)
        assert train.classes[:2] == ["airplane", "automobile"]
        assert train.read(49_999).shape == (32, 32, 3)
        assert (align_labels(train, test) == test.labels).all()
        mean, std, warning = measure_stats(train, 500)
        np.testing.assert_allclose(mean, (0.491, 0.482, 0.447), atol=0.02)
        np.testing.assert_allclose(std, (0.247, 0.243, 0.262), atol=0.02)
        assert warning is None


class TestNames:
    def test_suggestions(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "images").mkdir()
        for wrong, right in [("imagse", "images"), ("cifr10", "cifar10"), ("digit", "digits")]:
            with pytest.raises(ValueError, match=f"there is no {wrong}: did you mean {right}"):
                open_source(wrong)
        for wrong in ["/nowhere/at all", "nothing.parquet", "images/no", "~/not here/x"]:
            with pytest.raises(ValueError, match=f"there is no {wrong}"):
                open_source(wrong)

    def test_single_file(self, tmp_path):
        save(tmp_path / "one.png")
        with pytest.raises(ValueError, match="is a single file: give the folder"):
            open_source(tmp_path / "one.png")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "val"}, "split must be one of train, test"),
            ({"labels": "colum"}, "labels must be one of none, folder, column"),
            ({"in_chans": 0}, "in_chans must be at least 1"),
            ({"labels": "column"}, "which is a folder of images: pass --labels folder"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        save(tmp_path / "1.png")
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path, **options)

    @pytest.mark.parametrize("name", ["nobody-/no-such-set-", "nosuchsetofimages"])
    def test_sets_that_the_hub_does_not_give(self, name):
        with pytest.raises(ValueError, match=r"the Hugging Face hub did not give it .*check the name and the network"):
            open_source(name)

    def test_named_set_without_a_network(self, monkeypatch):
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
        with pytest.raises(ValueError, match=r"cifar10 can't be had .*check the network"):
            open_source("cifar10")


class TestChannels:
    def test_sixteen_bit_and_many_channels(self, tmp_path):
        for i in range(3):
            np.save(tmp_path / f"{i}.npy", np.full((4, 5, 6), 1000 * (i + 1), np.uint16))
        source = open_source(tmp_path, in_chans=6)
        np.testing.assert_allclose(source.read(0), np.full((4, 5, 6), 1000 / 257), rtol=1e-6)
        mean, std, warning = measure_stats(source)
        assert len(mean) == len(std) == 6
        assert min(std) > 0
        assert "value_range" in warning
        ranged = open_source(tmp_path, in_chans=6, value_range=(0, 4000))
        assert measure_stats(ranged).warning is None
        np.testing.assert_allclose(measure_stats(ranged).mean, [0.5] * 6, atol=1e-4)


class TestEvaluation:
    def folder(self, tmp_path):
        for i in range(7):
            save(tmp_path / "ab"[i % 2] / f"{i}.png", 10 * i, size=(9 + i, 12))
        (tmp_path / "a" / "2.png").write_text("words")
        return FolderSource(tmp_path, with_labels=True)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_order_labels_and_bad(self, tmp_path, workers):
        source = self.folder(tmp_path)
        loader = EvalLoader(source, Preprocess((8, 8)), batch_size=3, num_workers=workers)
        for _ in range(2):
            batches = list(loader)
            assert [len(b.index) for b in batches] == [2, 3, 1]
            index = [i for b in batches for i in b.index.tolist()]
            assert index == [0, 2, 3, 4, 5, 6]
            assert [int(p[0, 4, 4]) for b in batches for p in b.raw] == [0, 40, 60, 10, 30, 50]
            assert [x for b in batches for x in b.labels.tolist()] == source.labels[index].tolist()
            assert [name.endswith("2.png") for name, _ in loader.unreadable] == [True]

    def test_read_all_of_some(self, tmp_path):
        images = read_all(self.folder(tmp_path), Preprocess((8, 8)), indices=[6, 1, 0])
        assert images.index.tolist() == [6, 0]
        assert images.raw.shape == (2, 3, 8, 8)
        assert images.labels.tolist() == [1, 0]
        assert len(images.unreadable) == 1

    def test_nothing_readable(self, tmp_path):
        (tmp_path / "1.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"no image of .* can be read; .*1\.png: the file is empty"):
            read_all(FolderSource(tmp_path), Preprocess((8, 8)))
        with pytest.raises(ValueError, match=r"none of 1 images .* the file is empty"):
            measure_stats(FolderSource(tmp_path))


def test_bad_images_are_counted_once():
    bad = UnreadableImages()
    assert bad.add([("a", "cut"), ("b", "cut")]) == [("a", "cut"), ("b", "cut")]
    assert bad.add([("a", "cut"), ("c", "cut")]) == [("c", "cut")]
    assert UnreadableImages(bad.reports).count == bad.count == 3
    bad.check(3, 5)
    bad.check(None, 5)
    with pytest.raises(ValueError, match=r"3 of 5 images can't be read, more than max_unreadable = 2:\n  a: cut"):
        bad.check(2, 5)
    bad.add((str(i), "cut") for i in range(8))
    with pytest.raises(ValueError, match=r"11 of 900 .*= 10"):
        bad.check(None, 900)
    bad.check(None, 1001)
