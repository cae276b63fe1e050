"""Find the splits of a path: train/ next to test/, or train.parquet next to test.parquet."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from dmjd.regular import irregular
from dmjd.text import printable
from dmjd.warning import DMJDWarning

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy")

_TRAIN_NAMES = ("train", "training")

_TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that exists is the test split

SPLIT_NAMES = _TRAIN_NAMES + _TEST_NAMES  # of folders, in small or capital letters

_MASK_FOLDERS = ("masks", "labels", "annotations")  # next to images/, in sets for segmentation

_LISTS = (".csv", ".tsv", ".json", ".jsonl", ".xlsx")  # may list images, but are not read

SHARDS = (".tar", ".zip")

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

_SHARD_NAMES = {"train": _TRAIN_NAMES, "test": _TEST_NAMES}


_BREAKING = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")


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


def split_tables(path: Path, split: str) -> list[Path]:
    """The parquet files of a split of an existing path; empty for a folder of images.

    Raises:
        ValueError: if permission to read a folder is missing.
    """
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" and split == "train" else []
    with permission_checked(path):
        folders = _split_folders(path)
        tables = _tables(folders[split] if folders else path)
        for table in tables:
            if kind := irregular(table):
                raise ValueError(f"{printable(table)} is {kind}, not a file: move it away")
    if folders:
        return tables
    return files_of_split(tables, split)


def files_of_split(files: list[Path], split: str) -> list[Path]:
    """Those named after a split, if there are files of both: train-0.tar, test-0.tar. Else all are training files."""
    splits = {name: [file for file in files if _shard_of(file, names)] for name, names in _SHARD_NAMES.items()}
    if splits["train"] and splits["test"]:
        return splits[split]
    return files if split == "train" else []


def split_folder(path: Path, split: str) -> Path | None:
    """The folder of images of a split of an existing path, or None if there is no such split.

    Raises:
        ValueError: if the path is a file, or permission to read a folder is missing.
    """
    if path.is_file():
        if path.suffix.lower() in (".parquet", ".txt") or path.name.lower().endswith((*SHARDS, *COMPRESSED)):
            return None
        if path.suffix.lower() in _LISTS:
            raise ValueError(
                f"{printable(path)} is a list or table of a kind that is not supported yet: give the folder of the "
                "images, a .txt file with one path a line, or a .parquet file with a column of images"
            )
        raise ValueError(
            f"{printable(path)} is a single file: give the folder of images it lies in, or a .parquet file"
        )
    with permission_checked(path):
        folders = _split_folders(path)
    if folders:
        return folders[split]
    return path if split == "train" else None


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


def _shard_of(table: Path, names: tuple[str, ...]) -> bool:
    """Whether a file is named after a split: train.parquet, train-00000-of-00002.parquet."""
    return re.split(r"[-_.]", table.stem.lower())[0] in names


def _tables(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its data/ folder, as in hub repositories."""
    return _visible_tables(folder) or _visible_tables(folder / "data")


def _visible_tables(folder: Path) -> list[Path]:
    return sorted(t for t in folder.glob("*.parquet") if not t.name.startswith(".") and not t.is_dir())


def _split_folders(root: Path) -> dict[str, Path]:
    """train/ and test/ (or val/, ...) below root, also as Train/ or TRAIN/, if both exist."""
    train, test = (
        next((folder for name in names if (folder := _folder_named(root, name))), None)
        for names in (_TRAIN_NAMES, _TEST_NAMES)
    )
    return {"train": train, "test": test} if train is not None and test is not None else {}


def _folder_named(root: Path, name: str) -> Path | None:
    """The folder of this name in small or capital letters; looked up, since listing a million files takes long."""
    spelled = [folder for n in (name, name.capitalize(), name.upper()) if (folder := root / n).is_dir()]
    for other in spelled[1:]:
        if not other.samefile(spelled[0]):
            raise ValueError(f"{printable(root)} has both {spelled[0].name}/ and {other.name}/: rename one of them")
    return spelled[0] if spelled else None
