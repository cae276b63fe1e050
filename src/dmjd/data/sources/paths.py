"""Find the splits of a path: train/ next to test/, or train.parquet next to test.parquet."""

import contextlib
import os
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from dmjd.files import make_folder
from dmjd.regular import irregular
from dmjd.text import printable
from dmjd.warning import DMJDWarning

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy", ".dcm")

_TRAIN_NAMES = ("train", "training")

_VAL_NAMES = ("val", "valid", "validation")

_TEST_NAMES = ("test", "testing")

_NAMES = {"train": _TRAIN_NAMES, "val": _VAL_NAMES, "test": _TEST_NAMES}

SPLIT_NAMES = _TRAIN_NAMES + _VAL_NAMES + _TEST_NAMES  # of folders, in small or capital letters

_MASK_FOLDERS = ("masks", "labels", "annotations")  # next to images/, in sets for segmentation

_LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")

SHARDS = (".tar", ".zip")

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

_UNREAD = (".json", ".xlsx", ".xls", ".ods", ".ndjson")  # may list images, but are not read


_BREAKING = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")


def split_of_name(name: str) -> str | None:
    """The split that a folder, a shard or a value is named after: "Validation" is "val"; None if it is none."""
    return next((split for split, names in _NAMES.items() if name.strip().lower() in names), None)


def taken_split(found: Collection[str], split: str) -> str | None:
    """Which of the splits that a set has serves as ``split``: "val" as "test" if there is no "test"."""
    if split == "test" and "test" not in found:
        split = "val"
    return split if split in found else None


@contextlib.contextmanager
def permission_checked(path: Path) -> Iterator[None]:
    """Turn an OSError of a folder into a ValueError that names it."""
    try:
        yield
    except PermissionError:
        raise ValueError(
            f"no permission to read the folder {printable(path)}: change its permissions, or use a copy"
        ) from None
    except OSError as error:
        raise ValueError(f"{_shortened(path)} can't be read ({(error.strerror or str(error)).lower()})") from None


def expanded(data: str | Path) -> Path:
    """``data`` as a path with ``~`` expanded.

    Raises:
        ValueError: if it is empty, or there is no such user.
    """
    if not str(data).strip():
        raise ValueError("the path of the images is empty: give a folder of images, a .parquet file or a set name")
    try:
        return Path(data).expanduser()
    except RuntimeError:
        raise ValueError(f"{_shortened(data)}: there is no such user, whose home folder ~ could stand for") from None


def existing_path(data: str) -> Path | None:
    """``data`` as a path with ``~`` expanded, or None if there is no such file or folder.

    Raises:
        ValueError: if it is neither a file nor a folder, or cannot be looked at.
    """
    path = expanded(data)
    if "\0" in data:
        return None
    with permission_checked(path):
        if not path.exists():
            if path.is_symlink():
                raise ValueError(f"{_shortened(path)} is a link to nothing, or to itself")
            return None
        if not path.is_dir() and (kind := irregular(path)):
            raise ValueError(f"{_shortened(path)} is {kind}: give a folder of images or a .parquet file")
        return path


def _shortened(path: str | Path) -> str:
    text = printable(path)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def one_line(path: str) -> str:
    """A path with control characters, line breaks and bytes that are not UTF-8 as escapes.

    Format characters stay: they belong to names in many languages.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return _BREAKING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def path_inside(root: Path, folder: Path, name: str) -> str | None:
    """The path of ``name`` below ``folder``, or None if it leads out of ``root``.

    A name that stands in a file may come from others: ``..`` and absolute paths could point to any file. Links below
    the root, which its owner made, are followed.
    """
    path, top = (os.path.abspath(os.path.join(p, n)) for p, n in ((folder, name), (root, "")))
    return path if path.startswith(os.path.join(top, "")) and "\0" not in name else None


def split_tables(path: Path, split: str) -> tuple[str, list[Path]]:
    """Which split of an existing path serves as ``split``, and its parquet files; none for a folder of images.

    Raises:
        ValueError: if permission to read a folder is missing.
    """
    if path.is_file():
        return split, [path] if path.suffix.lower() == ".parquet" and split == "train" else []
    with permission_checked(path):
        folders = _split_folders(path)
        if folders:
            taken = taken_split(folders, split)
            return (taken, _regular_tables(folders[taken])) if taken else (split, [])
        tables = _regular_tables(path)
    return files_of_split(tables, split)


def files_of_split(files: list[Path], split: str) -> tuple[str, list[Path]]:
    """Which split of files named after splits serves as ``split``, and its files: train-0.tar, val-0.tar, ...

    All are training files, unless some are named after the training part and some after another one.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        # Shards are named after their split: train.parquet, train-00000-of-00002.parquet.
        if name := split_of_name(re.split(r"[-_.]", file.name)[0]):
            splits.setdefault(name, []).append(file)
    if "train" in splits and len(splits) > 1:
        rest = set(files).difference(*splits.values())
        if rest:
            text = f"{len(rest)} files next to {printable(splits['train'][0])} are in no part and are left out"
            warnings.warn(f"{text}, {printable(min(rest).name)} for one", DMJDWarning, stacklevel=1)
        taken = taken_split(splits, split)
        return (taken, splits[taken]) if taken else (split, [])
    return split, files if split == "train" else []


def split_folder(path: Path, split: str) -> tuple[str, Path] | None:
    """Which split of an existing path serves as ``split``, and its folder of images; None if there is none.

    Raises:
        ValueError: if the path is a file, or permission to read a folder is missing.
    """
    if path.is_file():
        if path.name.lower().endswith((*SHARDS, *COMPRESSED)):
            return None
        if path.suffix.lower() in _LISTS:
            return None
        if path.suffix.lower() in _UNREAD:
            raise ValueError(
                f"{printable(path)} is a list or table of a kind that is not supported: save it as .csv, .tsv, .jsonl "
                "or .parquet with a column of paths or images, or as .txt with one path a line"
            )
        raise ValueError(
            f"{printable(path)} is a single file: give the folder of images it lies in, or a .parquet file"
        )
    with permission_checked(path):
        folders = _split_folders(path)
    if folders:
        taken = taken_split(folders, split)
        return (taken, folders[taken]) if taken else None
    return ("train", path) if split == "train" else None


def warn_of_loose_images(root: Path) -> None:
    """Warn about images next to train/ and test/, since they are in neither."""
    folders = _split_folders(root)
    if not folders:
        return
    loose = [entry.name for entry in root.iterdir() if entry.suffix.lower() in EXTENSIONS and not entry.is_dir()]
    if loose:
        where = printable(folders["train"])
        warnings.warn(
            f"{len(loose)} images next to {where} are in no split and are left out", DMJDWarning, stacklevel=4
        )


def without_masks(root: Path, paths: list[str]) -> list[str]:
    """Leave out segmentation masks: ``masks/a.png`` if there is ``images/a.jpg``, for example. Warns about them.

    Args:
        root: a folder.
        paths: images in it, relative.
    """
    if not (root / "images").is_dir():
        return paths
    inside = [path.partition("/") for path in paths]
    images = {os.path.splitext(rest)[0] for top, _, rest in inside if top == "images"}
    is_mask = [top in _MASK_FOLDERS and os.path.splitext(rest)[0] in images for top, _, rest in inside]
    if any(is_mask):
        folder = printable(root / inside[is_mask.index(True)][0])
        warnings.warn(f"{sum(is_mask)} masks in {folder} are left out", DMJDWarning, stacklevel=4)
    return [path for path, mask in zip(paths, is_mask, strict=True) if not mask]


def cache_path(name: str, parent: str | None = None) -> Path:
    """Where :func:`cache_folder` lies, whether it exists or not."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmjd"
    return (own if parent is None else expanded(parent)) / name


def cache_folder(name: str, what: str, parent: str | None = None) -> Path:
    """A folder of the user's cache, which is made.

    Args:
        name: of the folder. what: is kept there, for the error.
        parent: the folder (``cache_dir``) that takes the place of that of the user.

    Raises:
        ValueError: if it cannot be written.
    """
    cache = cache_path(name, parent)
    try:
        make_folder(cache)
        if not os.access(cache, os.W_OK):
            raise ValueError
    except ValueError:
        cure = "set XDG_CACHE_HOME to" if parent is None else "give --cache-dir"
        raise ValueError(f"{what} in {printable(cache)}, which can't be written: {cure} a folder that can be") from None
    return cache


def _regular_tables(folder: Path) -> list[Path]:
    tables = _tables(folder)
    for table in tables:
        if kind := irregular(table):
            raise ValueError(f"{printable(table)} is {kind}, not a file: move it away")
    return tables


def _tables(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its data/ folder, as in hub repositories."""
    return _visible_tables(folder) or _visible_tables(folder / "data")


def _visible_tables(folder: Path) -> list[Path]:
    return sorted(t for t in folder.glob("*.parquet") if not t.name.startswith(".") and not t.is_dir())


def folders_to_test(root: Path) -> list[Path]:
    """The folders of a set that are never trained on: test/ and val/ next to a train/."""
    return [folder for split, folder in _split_folders(root).items() if split != "train"]


def _split_folders(root: Path) -> dict[str, Path]:
    """train/ and test/ or val/ below root, also as Train/ or TRAIN/; empty without train/ or without another one."""
    found = {
        split: next((folder for name in names if (folder := _folder_named(root, name))), None)
        for split, names in _NAMES.items()
    }
    folders = {split: folder for split, folder in found.items() if folder is not None}
    return folders if "train" in folders and len(folders) > 1 else {}


def _folder_named(root: Path, name: str) -> Path | None:
    """The folder of this name in small or capital letters; looked up, since listing a million files takes long."""
    spelled = [folder for n in (name, name.capitalize(), name.upper()) if (folder := root / n).is_dir()]
    for other in spelled[1:]:
        if not other.samefile(spelled[0]):
            raise ValueError(f"{printable(root)} has both {spelled[0].name}/ and {other.name}/: rename one of them")
    return spelled[0] if spelled else None
