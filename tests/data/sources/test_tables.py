"""Parquet files: columns, labels, shards, unreadable rows and errors."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import first_values, png, save, write_table
from support import REAL_DATA

from dmjd.data.sources.registry import align_labels, has_split, open_source
from dmjd.data.statistics import measure_stats
from dmjd.images.stored import UnreadableImage


def test_rows_labels_and_names(tmp_path):
    write_table(tmp_path / "x.parquet", [10, 20, 30], label=["dog", "cat", "dog"])
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "x.parquet", labels="column")))
    assert first_values(source) == [10, 20, 30]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, 0, 1]
    assert source.describe(2) == "row 2 of x.parquet"


def test_folder_of_files_and_splits(tmp_path):
    write_table(tmp_path / "data" / "train-00000-of-00002.parquet", [1, 2])
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", [3])
    write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", [4])
    train, test = (open_source(tmp_path, split=s) for s in ("train", "test"))
    assert (first_values(train), first_values(test)) == ([1, 2, 3], [4])
    assert train.describe(2) == "row 0 of train-00001-of-00002.parquet"
    assert not has_split(tmp_path / "data" / "train-00000-of-00002.parquet", "test")


def test_binary_column_and_paths(tmp_path):
    pq.write_table(pa.table({"img": pa.array([png(5)])}), tmp_path / "x.parquet")
    assert first_values(open_source(tmp_path / "x.parquet")) == [5]
    save(tmp_path / "p" / "one.png", 8)
    images = pa.array([{"bytes": None, "path": "one.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": images}), tmp_path / "p" / "y.parquet")
    assert first_values(open_source(tmp_path / "p" / "y.parquet")) == [8]


def test_errors(tmp_path):
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


def test_rows_without_image_are_unreadable(tmp_path):
    images = pa.array([{"bytes": png(1)}, {"bytes": b"no image"}, {"bytes": None}])
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.read(0).shape == (5, 6, 3)
    for row in (1, 2):
        with pytest.raises(UnreadableImage, match=f"row {row} of x.parquet"):
            source.read(row)


@pytest.mark.skipif(not (REAL_DATA / "cifar10").is_dir(), reason="the real data is not here")
def test_cifar10():
    train, test = (open_source(REAL_DATA / "cifar10", split=s, labels="column") for s in ("train", "test"))
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.classes[:2] == ["airplane", "automobile"]
    assert train.read(49_999).shape == (32, 32, 3)
    assert (align_labels(train, test) == test.labels).all()
    mean, std, warning = measure_stats(train, 500)
    np.testing.assert_allclose(mean, (0.491, 0.482, 0.447), atol=0.02)
    np.testing.assert_allclose(std, (0.247, 0.243, 0.262), atol=0.02)
    assert warning is None
