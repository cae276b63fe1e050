"""Lists with columns: CSV, TSV, JSON lines and parquet."""

import json
import os
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import save

from dmjd.data.sources.list_formats import open_list
from dmjd.data.sources.lists import ListSource
from dmjd.data.sources.registry import align_labels, has_split, open_source
from dmjd.data.sources.subset import labeled_images
from dmjd.data.sources.table_labels import optional_labels
from dmjd.data.sources.tables import ParquetSource
from dmjd.warning import DMJDWarning

ROWS = [
    {"path": "a/0.png", "label": "cat", "split": "train", "coarse": 10},
    {"path": "b/1.png", "label": "dog", "split": "train", "coarse": 2},
    {"path": "a/2.png", "label": "dog", "split": "Validation", "coarse": 2},
    {"path": "b/3.png", "label": "cat", "split": "test", "coarse": 10},
    {"path": "a/4, five.png", "label": "cat", "split": "TEST", "coarse": 10},
]


@pytest.fixture
def images(tmp_path):
    """Five gray images, 0, 10, 20, ..."""
    for i, row in enumerate(ROWS):
        save(tmp_path / "images" / row["path"], 10 * i)
    return tmp_path / "images"


def write(file, rows, sign=","):
    """A list of the format of its name."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sign = "\t" if file.suffix == ".tsv" else sign
        lines = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
        text = "\n".join(sign.join(f'"{value}"' for value in line) for line in lines)
        file.write_text(text + "\n", encoding="utf-8")
    return file


def values(source):
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "CSV"])
def test_splits_and_labels_of_every_format(images, ending):
    file = write(images / f"list.{ending}", ROWS)
    train, val, test = (open_source(file, split=split, labels="column") for split in ("train", "val", "test"))
    assert [values(one) for one in (train, val, test)] == [[0, 10], [20], [30, 40]]
    assert [one.split for one in (train, val, test)] == ["train", "val", "test"]
    assert (train.classes, train.labels.tolist(), test.labels.tolist()) == (["cat", "dog"], [0, 1], [0, 0])
    assert align_labels(train, val).tolist() == [1]
    assert train.title == f"{file} (train)"
    coarse = open_source(file, label_column="coarse")
    assert (coarse.classes, coarse.labels.tolist()) == (["2", "10"], [1, 0])
    assert isinstance(train, ListSource)


def test_without_a_test_part_the_validation_part_is_tested_on(images):
    file = write(images / "list.csv", ROWS[:3])
    test = open_source(file, split="test")
    assert (values(test), test.split) == ([20], "val")
    assert not has_split(write(images / "all.csv", [{"path": "a/0.png"}]), "test")


def test_a_semicolon_separates_columns_of_a_spreadsheet(images):
    file = write(images / "list.csv", [{"Label": "x", "File_Name": row["path"]} for row in ROWS], sign=";")
    assert values(open_source(file, labels="column")) == [0, 10, 20, 30, 40]


def test_marks_line_ends_and_line_breaks_in_names(images):
    save(images / "new\nline.png", 70)
    (images / "list.csv").write_bytes(b'\xef\xbb\xbfpath,label\r\n\r\n"new\nline.png",x\r\na/0.png,\r\n')
    source = open_source(images / "list.csv", labels="column")
    assert (values(source), source.labels.tolist(), source.classes) == ([70, 0], [0, -1], ["x"])
    (images / "list.jsonl").write_bytes(b'\xef\xbb\xbf{"path":"new\\nline.png"}\r\n\r\n{"path":"a/0.png","z":[1]}')
    assert values(open_source(images / "list.jsonl")) == [70, 0]


def test_paths_are_relative_to_the_root(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(images))
    rows = [
        {"path": "a/0.png"},
        {"path": str(images / "b" / "1.png")},
        {"path": "~/a/2.png"},
        {"path": "../images/b/3.png"},
    ]
    file = write(tmp_path / "list.csv", rows)
    assert values(open_source(file, root=images)) == [0, 10, 20, 30]
    with pytest.raises(
        ValueError, match=r"2 of 4 files in .* do not exist: a/0\.png, \.\./images/b/3\.png; paths are relative"
    ):
        open_source(file)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere \(--root\)"):
        open_source(file, root=tmp_path / "nowhere")


def test_missing_files_are_counted_named_and_tolerated(images):
    rows = [{"path": f"gone{i}.png"} for i in range(7)] + [{"path": "a/0.png"}]
    file = write(images / "list.csv", rows)
    named = ", ".join(f"gone{i}.png" for i in range(5))
    for tolerated in (None, 6, 0.5):
        with pytest.raises(
            ValueError, match=rf"7 of 8 files in .* do not exist: {named}, \.\.\.; .*--max-unreadable 7"
        ):
            open_source(file, max_unreadable=tolerated)
    for tolerated in (7, 0.9):
        with pytest.warns(DMJDWarning, match="7 of 8 files in .* do not exist"):
            assert len(open_source(file, max_unreadable=tolerated)) == 8
    with pytest.raises(ValueError, match="7 of 7 files"):
        open_source(write(file, rows[:7]), max_unreadable=7)


@pytest.mark.parametrize(
    ("rows", "labels", "classes"),
    [
        (["1", "", "10", "2"], [0, -1, 2, 1], ["1", "2", "10"]),
        (["3.0", "", "1.0", "nan"], [1, -1, 0, -1], ["1", "3"]),
        (["-1", "0", "0", "7"], [-1, 0, 0, 1], ["0", "7"]),
        (["a", " ", " b ", "10"], [1, -1, 2, 0], ["10", "a", "b"]),
    ],
)
def test_labels_may_be_missing(images, rows, labels, classes):
    pairs = zip(ROWS, rows, strict=False)
    file = write(images / "list.csv", [{"path": row["path"], "label": label} for row, label in pairs])
    source = open_source(file, labels="column")
    assert (source.labels.tolist(), source.classes) == (labels, classes)
    own = labeled_images(source)
    assert own.labels.tolist() == [label for label in labels if label >= 0]
    assert [source.class_of(i) for i in range(4)] == [classes[label] if label >= 0 else "" for label in labels]


def test_labels_of_json_and_parquet_have_types(images):
    for name, column in {"int": [3, None], "bool": [True, False], "text": ["x", None]}.items():
        rows = [{"path": row["path"], "target": label} for row, label in zip(ROWS, column, strict=False)]
        found = [open_source(write(images / f"{name}.{e}", rows), labels="column") for e in ("jsonl", "parquet")]
        assert found[0].classes == found[1].classes == sorted(str(v) for v in column if v is not None)
        assert found[0].labels.tolist() == found[1].labels.tolist()


BAD = {
    "list.csv": [
        (b"name,label\na,b\n", r"has no column of paths \(path, .*it has name, label: .*pass --path-column NAME"),
        (b"path,path\na,b\n", r"has two columns named 'path'"),
        (b"path,label\na/0.png,x\n\nb/1.png\n", r"line 4 of .* has 1 columns, the first line 2"),
        (
            b'path,label\n"a\n/0.png",x\nb/\xff.png,y\n',
            r"line 4 of .* is not UTF-8 text \(b/.*\): save the list as UTF-8",
        ),
        ("path\na/0.png\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"path\n", "lists no images"),
        (b"", "has no column of paths .*it has no columns"),
        (b"path,label\n,x\n", "line 2 of .* has no path: remove it"),
        (
            b'path,label\n"x\ny",1\na/0.png,2\n./a/0.png,3\n',
            r"line 5 of .* names the image of line 4 again: \./a/0\.png",
        ),
        (
            b"path,split\na/0.png,trian\nb/1.png,\n",
            "line 2 of .* has the split 'trian' .the first of 2.: .* train, val and test",
        ),
        (b"path,split\na/0.png,train\nb/1.png,\n", "line 3 of .* has no split"),
        (b"path,split\na/0.png,test\n", "has no train part"),
        (b"path\na\0b\n", "it holds null characters"),
    ],
    "list.jsonl": [
        (b'{"path": "a/0.png"}\n{"path": "b/1.png"\n', "line 2 of .* is not JSON"),
        (b'{"path": "a/0.png"}\n[1]\n', "line 2 of .* is not a JSON object"),
        (b'{"path": "a/0.png"}\n{"path": 3}\n', "line 2 of .*: 'path' is 3, not of type string"),
        (b'{"path": "a/0.png"}\n{"label": 3}\n', "line 2 of .* has no path"),
        (b'{"path": "a/\xff.png"}\n', "line 1 of .* is not UTF-8 text"),
        (b'{"image_url": "a/0.png"}\n', "has no column of paths .*it has image_url"),
        (b"", "has no column of paths"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_list_that_cannot_be_used_is_one_line(images, name, content, message):
    (images / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(images / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"path": "a/0.png"}], "has no label column .*; it has path: pass --label-column NAME"),
        ([{"path": "a/0.png", "label": 0.5}], "holds numbers such as 0.5, which are not classes"),
        ([{"path": "a/0.png", "label": ""}], "column 'label': no row has a label"),
    ],
)
def test_labels_that_cannot_be_used(images, rows, message):
    with pytest.raises(ValueError, match=message):
        open_source(write(images / "list.csv", rows), labels="column")
    with pytest.raises(ValueError, match=r"no label column \('nonsense'\)"):
        open_source(write(images / "list.csv", rows), label_column="nonsense")


def test_a_json_label_of_another_type_is_named_with_its_line(images):
    (images / "list.jsonl").write_text('{"path": "a/0.png", "label": 1}\n{"path": "b/1.png", "label": "x"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*: 'label' is .x., not of type int64"):
        open_source(images / "list.jsonl", labels="column")


def test_a_parquet_file_of_images_is_a_table_and_one_of_paths_a_list(images):
    png = (images / "a" / "0.png").read_bytes()
    pq.write_table(pa.table({"path": ["a/0.png"], "image": [png]}), images / "table.parquet")
    assert isinstance(open_source(images / "table.parquet"), ParquetSource)
    words = pa.table({"image": pa.array(["a/0.png", "b/1.png"]).dictionary_encode(), "x": [1.5, 2.5]})
    pq.write_table(words, images / "list.parquet")
    assert values(open_source(images / "list.parquet")) == [0, 10]
    pq.write_table(pa.table({"path": ["a/0.png", None]}), images / "list.parquet")
    with pytest.raises(ValueError, match=r"row 1 of .* has no path"):
        open_source(images / "list.parquet")


def test_a_run_keeps_its_images_and_finds_their_labels_in_a_list_that_changed(images, tmp_path):
    file = write(images / "list.csv", ROWS)
    began = open_source(file, labels="column")
    began.save_listing(tmp_path / "files.txt")
    fingerprint = began.fingerprint()
    write(file, [ROWS[3] | {"split": "train"}, ROWS[1] | {"label": "cat"}])
    again = open_source(file, labels="column", listing=tmp_path / "files.txt")
    assert (values(again), again.fingerprint()) == ([0, 10], fingerprint)
    assert [again.class_of(i) for i in range(2)] == ["", "cat"]


def test_a_list_that_moved_is_the_same_set_with_its_root(images, tmp_path):
    began = open_source(write(images / "list.csv", ROWS))
    began.save_listing(tmp_path / "files.txt")
    (tmp_path / "elsewhere").mkdir()
    os.rename(images / "list.csv", tmp_path / "elsewhere" / "list.csv")
    moved = open_source(tmp_path / "elsewhere" / "list.csv", root=images, listing=tmp_path / "files.txt")
    assert moved.changes(began.fingerprint()) is not None
    with warnings.catch_warnings(action="error"):
        assert values(moved) == [0, 10]


WHOLE = {
    "csv": b'path,label,split\r\n"a b.png",1,train\n"x\ny.png",,val\nc.png,3,test\n',
    "jsonl": b'{"path":"a","label":1,"split":"train"}\n\n{"path":"b","label":null,"z":[1,{"q":2}],"split":"val"}\n',
}
PIECES = [
    b'"',
    b"\n",
    b",",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"9" * 30,
    b"\\ud800",
    b"[1]",
    b";",
    b"\r",
    b"",
    b"1e400",
]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["csv", "jsonl"]),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9), st.sampled_from(PIECES)), max_size=3),
)
def test_a_damaged_list_is_read_or_one_line(tmp_path_factory, ending, changes):
    content = bytearray(WHOLE[ending])
    for start, length, piece in changes:
        content[start : start + length] = piece
    file = tmp_path_factory.getbasetemp() / f"damaged.{ending}"
    file.write_bytes(content)
    error = None
    try:
        rows = open_list(file)
        count, splits = len(rows.paths), {rows.split_rows(split)[0] for split in ("train", "val", "test")}
        labels, _ = optional_labels(rows.labels(rows.label_column(None)), "labels")
        last = rows.where(count - 1)
    except ValueError as caught:
        error = caught
    if error is not None:
        assert type(error) is ValueError  # none of pyarrow's
        assert "\n" not in str(error)
        return
    assert len(labels) == count > 0
    assert splits <= {"", "train", "val", "test"}
    assert last.startswith("line ")
