"""The paths of a list: made absolute, their common folder, and which of them do not exist, for a million at once."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LISTED = 8  # files of a folder from which on listing the folder is faster than a call for each of them

_THREADS = 16  # waits for a network drive overlap

_UNUSUAL = r"(^|/)\.{1,2}(/|$)|//|/$|^$|^~"  # paths that have to be normalized


def absolute_paths(paths: pa.LargeBinaryArray, root: str) -> pa.LargeBinaryArray:
    """Paths without "." and "..", ``~`` expanded: [n] large_binary.

    Args:
        paths: [n] as they are written, relative to ``root`` or absolute.
        root: an absolute path.
    """
    if os.sep != "/":
        return _binary([_absolute(path, root) for path in paths.to_pylist()])
    below = pc.binary_join_element_wise(_scalar(root), paths, _scalar("" if root == "/" else "/"))
    joined = pc.if_else(pc.starts_with(paths, b"/"), paths, below)
    unusual = np.flatnonzero(pc.match_substring_regex(paths, _UNUSUAL).to_numpy(zero_copy_only=False))
    if not len(unusual):
        return joined
    mask = np.zeros(len(paths), dtype=bool)
    mask[unusual] = True
    return pc.replace_with_mask(
        joined, pa.array(mask), _binary([_absolute(path, root) for path in paths.take(unusual).to_pylist()])
    )


def _absolute(path: bytes, root: str) -> bytes:
    text = os.path.normpath(os.path.join(root, os.path.expanduser(os.fsdecode(path))))
    if os.sep == "/" and text.startswith("//"):  # POSIX leaves the meaning of two slashes open; no system uses it
        text = text[1:]
    return os.fsencode(text.replace(os.sep, "/"))


def common_folder(paths: pa.LargeBinaryArray) -> str:
    """The deepest folder that holds all of at least one absolute path."""
    bounds = pc.min_max(paths).as_py()  # what the first and the last one in order share, all share
    return os.fsdecode(os.path.commonpath([os.path.dirname(path) for path in bounds.values()]))


def relative_paths(paths: pa.LargeBinaryArray, folder: str) -> pa.LargeBinaryArray:
    """Absolute paths relative to a folder that holds all of them."""
    return pc.replace_substring(paths, os.fsencode(folder.rstrip("/")) + b"/", "", max_replacements=1)


def first_repeated(paths: pa.LargeBinaryArray) -> tuple[int, int] | None:
    """The first row that repeats another one, and that one; None if all differ."""
    codes = pc.dictionary_encode(paths).indices.to_numpy()  # numbered in the order in which they occur
    if len(codes) == 0 or codes[-1] == len(codes) - 1:
        return None
    row = int(np.flatnonzero(codes != np.arange(len(codes)))[0])
    return row, int(np.flatnonzero(codes == codes[row])[0])


def without_first_frame(paths: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Paths in which ``a.dcm#1`` is ``a.dcm``, which is the same image."""
    if not pc.any(pc.ends_with(paths, b"#1")).as_py():
        return paths
    return pc.replace_substring_regex(paths, r"(?i)(\.dcm)#1$", r"\1")


def missing_rows(paths: pa.LargeBinaryArray) -> np.ndarray:
    """The rows of absolute paths that are no files: [m] int64, ascending. Large folders are listed once.

    ``a.dcm#2``, a frame, is there if ``a.dcm`` is.
    """
    if pc.any(pc.match_substring(paths, b"#")).as_py():  # frames of DICOM files
        paths = pc.replace_substring_regex(paths, r"(?i)(\.dcm)#[0-9]+$", r"\1")
    folders = pc.dictionary_encode(pc.replace_substring_regex(paths, r"/[^/]*$", ""))
    codes = folders.indices.to_numpy()
    order = np.argsort(codes, kind="stable")  # rows folder by folder
    names = pc.replace_substring_regex(paths, r"(?s)^.*/", "").take(pa.array(order))
    ends = np.cumsum(np.bincount(codes, minlength=len(folders.dictionary)))

    def missing_in(folder: int) -> np.ndarray:
        start, end = int(ends[folder - 1]) if folder else 0, int(ends[folder])
        return order[start:end][_missing(folders.dictionary[folder].as_py(), names[start:end].to_pylist())]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(missing_in, range(len(ends)), chunksize=64))
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *found]))


def _missing(folder: bytes, names: list[bytes]) -> np.ndarray:
    """[n] bool: which of the names are no files in a folder."""
    files: set[bytes] = set()
    if len(names) >= _LISTED:
        with contextlib.suppress(OSError), os.scandir(folder or b"/") as entries:  # missing, or not readable
            files = {entry.name for entry in entries if _is_file(entry)}
    # A file system may not tell capital letters, or ways to write an accent, apart: it has the last word.
    return np.array([n not in files and not os.path.isfile(folder + b"/" + n) for n in names], dtype=bool)


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _scalar(text: str) -> pa.LargeBinaryScalar:
    return pa.scalar(os.fsencode(text), pa.large_binary())


def _binary(values: list[bytes]) -> pa.LargeBinaryArray:
    return pa.array(values, pa.large_binary())
