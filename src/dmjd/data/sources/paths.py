"""Find the splits of a path: train/ next to test/, or train.parquet next to test.parquet."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy")

_TEST_NAMES = ("test", "val", "valid", "validation")  # the first that exists is the test split

_SHARD_NAMES = {"train": ("train",), "test": _TEST_NAMES}


@contextlib.contextmanager
def permission_checked(path: Path) -> Iterator[None]:
    """Turn a PermissionError into a ValueError that names the folder."""
    try:
        yield
    except PermissionError:
        raise ValueError(f"no permission to read the folder {path}: change its permissions, or use a copy") from None


def existing_path(data: str) -> Path | None:
    """``data`` as a path with ``~`` expanded, or None if there is no such file or folder."""
    path = Path(data).expanduser()
    with permission_checked(path):
        return path if path.exists() else None


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
    if folders:
        return tables
    splits = {name: [t for t in tables if _shard_of(t, names)] for name, names in _SHARD_NAMES.items()}
    if splits["train"] and splits["test"]:
        return splits[split]
    return tables if split == "train" else []


def split_folder(path: Path, split: str) -> Path | None:
    """The folder of images of a split of an existing path, or None if there is no such split.

    Raises:
        ValueError: if the path is a file, or permission to read a folder is missing.
    """
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return None
        raise ValueError(f"{path} is a single file: give the folder of images it lies in, or a .parquet file")
    with permission_checked(path):
        folders = _split_folders(path)
    if folders:
        return folders[split]
    return path if split == "train" else None


def warn_of_loose_images(root: Path) -> None:
    """Warn about images next to train/ and test/, since they are in neither."""
    loose = (
        [entry.name for entry in root.iterdir() if entry.suffix.lower() in EXTENSIONS] if _split_folders(root) else []
    )
    if loose:
        warnings.warn(f"{len(loose)} images next to {root / 'train'} are in no split and are left out", stacklevel=4)


def _shard_of(table: Path, names: tuple[str, ...]) -> bool:
    """Whether a file is named after a split: train.parquet, train-00000-of-00002.parquet."""
    return re.split(r"[-_.]", table.stem)[0] in names


def _tables(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its data/ folder, as in hub repositories."""
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _split_folders(root: Path) -> dict[str, Path]:
    """train/ and test/ (or val/) below root, if both exist."""
    test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        return {}
    return {"train": root / "train", "test": test}
