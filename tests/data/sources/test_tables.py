"""Parquet files: columns, labels, shards, unreadable rows and errors."""

import os
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
        ("holes", "column", "column .label.: 1 of 2 rows have no label, row 0 for one"),
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


def table_of(file, images, **columns) -> None:
    pq.write_table(pa.table({"image": images, **columns}), file)


def test_paths_may_not_lead_out_of_the_folder_of_the_table(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    save(tmp_path / "secret.png", 9)
    save(tmp_path / "set" / "train" / "a.png", 1)
    save(tmp_path / "set" / "val" / "b.png", 2)
    (tmp_path / "set" / "linked").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "set" / "train" / "fifo.png")
    outside = ["../secret.png", "../../secret.png", str(tmp_path / "secret.png"), "x/../../../secret.png", "/etc/hosts"]
    inside = ["a.png", "../val/b.png", str(tmp_path / "set" / "train" / "a.png"), "../linked/secret.png"]
    rows = [{"bytes": None, "path": path} for path in [*outside, *inside, "fifo.png", "https://a.b/c.png", "a\0.png"]]
    for folder in (tmp_path / "set" / "train", tmp_path / "set" / "val"):
        table_of(folder / "x.parquet", pa.array(rows, kind))
    source = open_source(tmp_path / "set")
    reasons = []
    for i in range(len(source)):
        try:
            reasons.append(int(source.read(i)[0, 0, 0]))
        except UnreadableImage as error:
            reasons.append(error.reason)
    assert all("leads out of" in str(reason) for reason in reasons[1 : len(outside)])
    assert reasons[0] == "no such file or directory"  # below the root, but not there
    assert reasons[len(outside) : -3] == [1, 2, 1, 9]
    assert reasons[-3] == "it is a FIFO, not a file"
    assert reasons[-2] == "no such file or directory"


def test_other_forms_of_image_columns(tmp_path):
    nothing = pa.array([{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.null()), ("path", pa.string())]))
    save(tmp_path / "a.png", 4)
    table_of(tmp_path / "null.parquet", nothing)
    assert first_values(open_source(tmp_path / "null.parquet")) == [4]
    both = pa.array([{"bytes": png(6), "path": "a.png"}])
    table_of(tmp_path / "both.parquet", both)
    assert first_values(open_source(tmp_path / "both.parquet")) == [6]
    odd = tmp_path / "a [1]*?.parquet"
    table_of(odd, both)
    assert first_values(open_source(odd)) == [6]
    for name, column in {
        "texts": pa.array([{"bytes": "words", "path": "a.png"}]),
        "nested": pa.array([{"image": {"bytes": png(6), "path": None}}]),
        "list": pa.array([[{"bytes": png(6), "path": None}]]),
    }.items():
        table_of(tmp_path / f"{name}.parquet", column)
        with pytest.raises(ValueError, match="has no column of encoded images"):
            open_source(tmp_path / f"{name}.parquet")
    table_of(tmp_path / "empty.parquet", both[:0], label=pa.array([], pa.int64()))
    for labels in ("none", "column"):
        with pytest.raises(ValueError, match="has no rows"):
            open_source(tmp_path / "empty.parquet", labels=labels)
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is a FIFO, not a file"):
        open_source(tmp_path / "set")


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write_table(tmp_path / "x.parquet", [1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none/datasets")
    with pytest.raises(ValueError, match=r"cached in /proc/none/datasets, which can't be written .*: set HF_HOME"):
        open_source(tmp_path / "x.parquet")


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
