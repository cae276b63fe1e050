"""Paths of a list, many at once: the same as one by one."""

import os

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd.data.sources.list_paths import (
    absolute_paths,
    common_folder,
    first_repeated,
    missing_rows,
    relative_paths,
)

PARTS = st.sampled_from([b"a", b"b", b"..", b".", b"", b"ab", b"new\nline", b"\xff", b"~", b" x"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(b"/".join).filter(bool)


def array(paths):
    return pa.array(paths, pa.large_binary())


@settings(deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=20))
def test_absolute_and_relative_paths(paths):
    root = "/folder/of it"
    found = absolute_paths(array(paths), root)
    expected = [
        os.path.normpath(os.path.join(os.fsencode(root), os.path.expanduser(path))).replace(b"//", b"/")
        for path in paths
    ]
    assert found.to_pylist() == expected
    folder = common_folder(found)
    assert folder == os.fsdecode(os.path.commonpath([os.path.dirname(path) for path in found.to_pylist()]))
    joined = [os.path.join(os.fsencode(folder), path) for path in relative_paths(found, folder).to_pylist()]
    assert joined == found.to_pylist()


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"/a", b"/b", b"/a/b", b"/c"]), max_size=5))
def test_the_first_repeated_path(paths):
    repeated = next((i for i in range(len(paths)) if paths[i] in paths[:i]), None)
    expected = None if repeated is None else (repeated, paths.index(paths[repeated]))
    assert first_repeated(array(paths)) == expected


def test_missing_rows_are_those_that_are_no_files(tmp_path):
    """In a folder that is listed, in one that is not, without a folder, and through links."""
    for folder, count in {"many": 20, "few": 2}.items():
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}").touch()
    (tmp_path / "many" / "folder").mkdir()
    (tmp_path / "many" / "link").symlink_to(tmp_path / "few" / "1")
    (tmp_path / "many" / "to nothing").symlink_to(tmp_path / "few" / "nothing")
    names = [f"many/{i}" for i in range(22)] + [
        "few/0",
        "none/0",
        "few/3",
        "many/folder",
        "many/link",
        "many/to nothing",
    ]
    paths = [os.fsencode(tmp_path / name) for name in names] + [b"/nothing"]
    expected = [i for i, path in enumerate(paths) if not os.path.isfile(path)]
    assert missing_rows(array(paths)).tolist() == expected
    assert missing_rows(array(paths[:2])).tolist() == []
