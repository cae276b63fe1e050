"""Label columns of every type: right classes, or one clear error."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import png

from dmjd.data.sources.registry import open_source

NAN = float("nan")


def labels_of(tmp_path, column: pa.Array) -> tuple[list[int], list[str]]:
    images = pa.array([{"bytes": png(1), "path": None}] * len(column))
    pq.write_table(pa.table({"image": images, "label": column}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", labels="column")
    return source.labels.tolist(), source.classes


@pytest.mark.parametrize(
    ("column", "labels", "classes"),
    [
        (pa.array([3, 1, 3]), [1, 0, 1], ["1", "3"]),
        (pa.array([3.0, 10.0, 3.0]), [0, 1, 0], ["3", "10"]),
        (pa.array([2**63 - 1, 0]), [1, 0], ["0", str(2**63 - 1)]),
        (pa.array([2**64 - 1, 0], pa.uint64()), [1, 0], ["0", str(2**64 - 1)]),
        (pa.array([True, False]), [1, 0], ["False", "True"]),
        (pa.array(["b", "a", "b"]), [1, 0, 1], ["a", "b"]),
        (pa.array(["b", "a"], pa.large_string()), [1, 0], ["a", "b"]),
        (pa.array([b"b", "\u00e9".encode()]), [0, 1], ["b", "\u00e9"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ["a", "b"]),
        (pa.array([0.0, 1.0], pa.float16()), [0, 1], ["0", "1"]),
    ],
)
def test_classes(tmp_path, column, labels, classes):
    assert labels_of(tmp_path, column) == (labels, classes)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.0, NAN, NAN]), "2 of 3 rows have no label, row 1 for one"),
        (pa.array([1, None]), "1 of 2 rows have no label, row 1 for one"),
        (pa.array([None, "a"]), "1 of 2 rows have no label, row 0 for one"),
        (pa.array([None, None]), "2 of 2 rows have no label"),
        (pa.array([1, -1, 2]), "1 of 3 rows have no label, row 1 for one"),
        (pa.array([1.0, -1.0]), "1 of 2 rows have no label, row 1 for one"),
        (pa.array(["a", "", " "]), "2 of 3 rows have no label, row 1 for one"),
        (pa.array([0.5, 1.0]), "holds numbers such as 0.5, which are not classes"),
        (pa.array([np.inf, 1.0]), "holds numbers such as inf, which are not classes"),
        (pa.array([1e300, 1.0]), "which are not classes"),
        (pa.array([[1], [2]]), "holds values of type list.*: a label is a whole number"),
        (pa.array([{"a": 1}, {"a": 2}]), "holds values of type struct<a: int64>"),
        (pa.array([b"\xff", b"a"]), "holds bytes that are not UTF-8 text"),
        (pa.array([datetime.date(2020, 1, 1)] * 2), "holds values of type date32"),
    ],
)
def test_values_that_are_no_classes_are_one_line(tmp_path, column, message):
    with pytest.raises(ValueError, match=f"x.parquet: column 'label'.*{message}") as caught:
        labels_of(tmp_path, column)
    assert len(str(caught.value).splitlines()) == 1


def test_declared_classes_and_another_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        label=datasets.ClassLabel(names=["dog", "cat"]), image={"bytes": datasets.Value("binary")}
    )
    rows = {"label": [1, 0], "image": [{"bytes": png(1)}] * 2}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", labels="column")
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["dog", "cat"])
    table = pq.read_table(tmp_path / "x.parquet")
    beyond = table.set_column(table.schema.get_field_index("label"), "label", pa.array([1, 2]))
    pq.write_table(beyond.replace_schema_metadata(table.schema.metadata), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="has the label 2, but names only 2 classes"):
        open_source(tmp_path / "y.parquet", labels="column")
    images = pa.array([{"bytes": png(1), "path": None}] * 2)
    both = pa.table({"image": images, "label": pa.array([[1], [2]]), "class": pa.array(["a", "b"])})
    pq.write_table(both, tmp_path / "z.parquet")
    assert open_source(tmp_path / "z.parquet", labels="column").classes == ["a", "b"]
