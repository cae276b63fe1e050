"""From what a user calls their data to a source: folder, parquet, named set, hub set, or the embedded digits."""

import contextlib
import difflib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmjd.config.fields import LABELS
from dmjd.data.sources.base import Source
from dmjd.data.sources.digits import DigitsSource
from dmjd.data.sources.folder import EXTENSIONS, FolderSource
from dmjd.data.sources.tables import hub_has_split, hub_source, parquet_source
from dmjd.data.sources.torchvision_sets import NAMED_SETS, NamedSource

SPLITS = ("train", "test")

_TEST_NAMES = ("test", "val", "valid", "validation")  # the first that exists is the test part

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_source(
    data: str | Path,
    *,
    split: str = "train",
    labels: str = "none",
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    listing: Path | None = None,
    masks: bool = False,
) -> Source:
    """Open a set of images.

    Args:
        data: "digits"; a torchvision name such as "cifar10"; a folder of images; a .parquet file or a folder of
            them; or the name of a Hugging Face dataset. Known names win over folders: write "./digits" for a folder.
            A folder with train/ and test/ (or val/), or train.parquet and test.parquet (or shards of such names),
            gives both splits.
        split: "train" or "test".
        labels: "none"; "folder", the first folder below the root; "column" of a table. Digits and named sets always
            have theirs.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        listing: for folders, a file that may hold the sorted list of images (``Source.save_listing``).
        masks: of a table, the segmentation masks instead of the images they belong to.

    Raises:
        ValueError: saying what is wrong with ``data`` and what to do.
    """
    _check_options(split, labels, in_chans)
    name = str(data)
    if masks and (name == "digits" or name in NAMED_SETS):
        raise ValueError(_no_masks(name))
    if name == "digits":
        return DigitsSource(split, in_chans)
    if name in NAMED_SETS:
        return NamedSource(name, split, in_chans, value_range)
    options = {"with_labels": labels != "none", "in_chans": in_chans, "value_range": value_range}
    path = _existing(name)
    if path is None:
        _refuse_labels(name, labels, "folder", "the name of a hub dataset")
        return hub_source(name, split, masks=masks, **options)
    part = _part(path, split)
    if part is None:
        raise ValueError(
            f"{name} has no {split} part (a folder test/ or val/ beside train/, or test.parquet beside train.parquet): "
            "pass --test-data"
        )
    if isinstance(part, list):
        _refuse_labels(name, labels, "folder", "a table")
        return parquet_source(part, name, masks=masks, **options)
    if masks:
        raise ValueError(_no_masks(name))
    _refuse_labels(name, labels, "column", "a folder of images")
    return FolderSource(part, labels == "folder", in_chans, value_range, listing)


def has_split(data: str | Path, split: str) -> bool:
    """Whether :func:`open_source` finds this split; a hub name asks the hub."""
    name = str(data)
    if name == "digits" or name in NAMED_SETS:
        return True
    path = _existing(name)
    return hub_has_split(name, split) if path is None else _part(path, split) is not None


def align_labels(train: Source, test: Source) -> np.ndarray:
    """The test set's labels as indices into the training set's classes, [n] int64.

    Raises:
        ValueError: a set without labels, or a test class that the training set does not have.
    """
    for source in (train, test):
        if source.labels is None:
            raise ValueError(f"{source.name} has no labels: pass --labels folder or --labels column")
    assert test.labels is not None
    place = {name: index for index, name in enumerate(train.classes)}
    unknown = [test.classes[i] for i in np.unique(test.labels) if test.classes[i] not in place]
    if unknown:
        raise ValueError(f"classes of {test.name} that {train.name} does not have: {', '.join(unknown[:10])}")
    return np.array([place.get(name, -1) for name in test.classes], dtype=np.int64)[test.labels]


def _check_options(split: str, labels: str, in_chans: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got '{labels}'")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")


def _no_masks(name: str) -> str:
    return (
        f"{name} holds no images with masks: give a folder with train/images and train/masks (or images/training and "
        "annotations/training), or a .parquet file or hub set with a column of images and one of masks"
    )


def _refuse_labels(name: str, labels: str, wrong: str, kind: str) -> None:
    if labels == wrong:
        right = "column" if wrong == "folder" else "folder"
        raise ValueError(f"labels '{wrong}' does not fit {name}, which is {kind}: pass --labels {right}")


def absolute(data: str) -> str:
    """``data`` as a run keeps it: a path made absolute, so that the run can be evaluated from any folder."""
    if data == "digits" or data in NAMED_SETS or not Path(data).expanduser().exists():
        return data
    return os.path.abspath(Path(data).expanduser())


def _existing(name: str) -> Path | None:
    """The path that ``name`` is, or None where it can only be a set of the hub.

    Raises:
        ValueError: for a path that isn't there.
    """
    path = Path(name).expanduser()
    with _permission(path):
        if path.exists():
            return path
        nearby = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if path.parent == Path():
        nearby += ["digits", *NAMED_SETS]
    close = difflib.get_close_matches(path.name, nearby, n=1, cutoff=0.75)
    known_ending = path.suffix.lower() in (*EXTENSIONS, ".parquet")
    beside_files = path.parent != Path() and path.parent.is_dir()
    if close or known_ending or beside_files or not _HUB_NAME.fullmatch(name):
        hint = f"did you mean {path.parent / close[0]}?" if close else "give a folder of images or a .parquet file"
        raise ValueError(f"there is no {name}: {hint}")
    return None


def _part(path: Path, split: str) -> Path | list[Path] | None:
    """Where a split of an existing path lies: a folder of images, a list of parquet files, or nowhere.

    Raises:
        ValueError: a file that is no parquet, or a folder that may not be read.
    """
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"{path} is a single file: give the folder of images it lies in, or a .parquet file")
        return [path] if split == "train" else None
    with _permission(path):
        folders = _split_folders(path)
        tables = _tables(folders[split] if folders else path)
    if folders:
        return tables or folders[split]
    splits = {name: [t for t in tables if _shard_of(t, names)] for name, names in _SHARD_NAMES.items()}
    if splits["train"] and splits["test"]:
        return splits[split]
    if split == "test":
        return None
    return tables or path


@contextlib.contextmanager
def _permission(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise ValueError(f"no permission to read the folder {path}: change its permissions, or use a copy") from None


_SHARD_NAMES = {"train": ("train",), "test": _TEST_NAMES}


def _shard_of(table: Path, names: tuple[str, ...]) -> bool:
    """Whether a file is named after a split: train.parquet, train-00000-of-00002.parquet."""
    return re.split(r"[-_.]", table.stem)[0] in names


def _tables(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its data/ as in the repositories of the hub."""
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _split_folders(root: Path) -> dict[str, Path]:
    """train/ and test/ (or val/) below root, if both are there."""
    test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        return {}
    loose = [entry.name for entry in root.iterdir() if entry.suffix.lower() in EXTENSIONS]
    if loose:
        warnings.warn(f"{len(loose)} images beside {root / 'train'} are in no split and left out", stacklevel=4)
    return {"train": root / "train", "test": test}
