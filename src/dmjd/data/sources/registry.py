"""Open a source from the path or name that a user gives. The kinds of sources are listed in one table."""

import difflib
import glob
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dmjd.config.fields import LABELS, SPLITS
from dmjd.config.invalid import BLENDED, check_alpha, nodata_text
from dmjd.config.sources import Data, check_sources, check_whole, data_text, given_sources, overlapping
from dmjd.data.sources.addresses import ends_with, is_url, local_path
from dmjd.data.sources.base import FETCHED_FIRST, RemoteOptions, Source, SourceOptions
from dmjd.data.sources.digits import DigitsSource
from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.hub import HubSource
from dmjd.data.sources.list_formats import ENDINGS
from dmjd.data.sources.lists import ListSource
from dmjd.data.sources.mixture import MixtureSource, listing_of
from dmjd.data.sources.paths import COMPRESSED, EXTENSIONS, SHARDS, existing_path, expanded, permission_checked
from dmjd.data.sources.remote import fetch
from dmjd.data.sources.shard_files import is_shards
from dmjd.data.sources.shards import ShardSource
from dmjd.data.sources.table_columns import is_list_table
from dmjd.data.sources.tables import ParquetSource
from dmjd.data.sources.torchvision_sets import NamedSource
from dmjd.images.invalid import invalid_pixels
from dmjd.text import printable, without_secrets
from dmjd.warning import DMJDWarning

# The kinds of sources, in order of precedence: the first that matches is opened. Names win over paths.
SOURCES: tuple[type[Source], ...] = (
    DigitsSource,
    NamedSource,
    ParquetSource,
    ListSource,
    ShardSource,
    FolderSource,
    HubSource,
)


def open_source(
    data: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    labels: str = "none",
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    listing: Path | None = None,
    masks: bool = False,
    root: str | Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    max_unreadable: float | None = None,
    nodata: str | float | None = None,
    alpha: str = BLENDED,
    remote: RemoteOptions = FETCHED_FIRST,
) -> Source:
    """Open a set of images.

    Args:
        data: "digits"; a torchvision name such as "cifar10"; a folder of images; a .parquet file or a folder of
            them; a list of images (.txt with a path a line; .csv, .tsv, .jsonl or .parquet with a column of paths); a
            .tar or .zip file, a folder of them, or a pattern such as "a/*.tar"; the address of such files; or the name
            of a Hugging Face dataset. Names win over folders: write "./digits" for a folder, or give a Path. A folder
            with train/ and val/ or test/ (capital letters do not matter), train.parquet and test.parquet (or shards of
            such names), or a list with a column "split", gives the splits. Several of these are one set, a
            :class:`~dmjd.data.sources.mixture.MixtureSource`: ["A", "B:0.3"], of which a run draws 30 % of the samples
            from B.
        split: "train", "val" or "test". Without a test part, the validation part is the test part too.
        labels: "none"; "folder", the first folder below the root; or "column" of a table or list, for shards the
            members .cls, .json or .txt. Digits and torchvision sets are always labeled.
        in_chans, value_range: see :func:`~dmjd.images.reading.read_image`.
        listing: for folders, a file that may hold the sorted list of images (``Source.save_listing``); for several
            sets one each, of which this gives the folder and the name.
        masks: open the segmentation masks of a table instead of its images.
        root: for lists, the folder that paths are relative to; None: the folder of the list.
        path_column, label_column: the columns of paths and labels; None: the first with a usual name. With
            ``label_column``, ``labels`` is "column".
        max_unreadable: for lists, how many of the files may be missing, or a share below 1; None: none.
        nodata, alpha: which pixels are invalid: see :class:`~dmjd.images.preprocess.Preprocess`.
        remote: how remote files are read.

    Raises:
        ValueError: saying what is wrong with ``data`` and how to fix it.
    """
    labels = "column" if label_column is not None and labels == "none" else labels
    _check_options(split, labels, in_chans, label_column)
    lists = (None if root is None else str(root), path_column, label_column, max_unreadable)
    invalid = (nodata_text(nodata), check_alpha(alpha))
    options = SourceOptions(split, labels, in_chans, value_range, listing, masks, *lists, *invalid, remote)
    if not isinstance(data, str | Path):
        return _open_several(data, options)
    name = _named(data)
    kind = _kind_of(name, options)
    _check_kind(kind, name, options)
    source = kind.from_data(name, options)
    source.invalid = invalid_pixels(*invalid)
    source.name = without_secrets(source.name)
    return source


def _check_kind(kind: type[Source], name: str, options: SourceOptions) -> None:
    """Check that a kind of sources has the masks and labels that are wanted; warn of a folder with a set's name."""
    if options.masks and not kind.can_hold_masks:
        raise ValueError(
            f"{name} holds no images with masks: give a folder with train/images and train/masks (or images/training "
            "and annotations/training), or a .parquet file or hub set with a column of images and one of masks"
        )
    if kind.label_option is not None and options.labels not in ("none", kind.label_option):
        raise ValueError(
            f"labels '{options.labels}' does not fit {name}, which is {kind.kind}: pass --labels {kind.label_option}"
        )
    if name in kind.names and os.path.isdir(name):
        warnings.warn(
            f"'{name}' is {kind.kind} here, not the folder {name}/ that lies in this folder: write ./{name} for that",
            DMJDWarning,
            stacklevel=3,
        )


def _kind_of(name: str, options: SourceOptions) -> type[Source]:
    """The kind of a set. A remote .parquet file is fetched to see whether it holds paths instead of images."""
    kind = _find(name, options.split)
    if kind is None:
        raise ValueError(missing_split(name, options.split))
    if kind is ParquetSource and is_url(name):
        files = [*fetch(name, options.remote.cache_dir).files.values()]
        return ListSource if is_list_table(files[0]) else kind
    return kind


def missing_split(data: str, split: str) -> str:
    """What to do about data without a split, in an error."""
    folder = "test/ or val/" if split == "test" else f"{split}/"
    table = f"{split}.parquet next to train.parquet, or rows of split {split} in a list"
    cure = "pass --test-data" if split == "test" else f"give data that has one, or another --split than {split}"
    return f"{data} has no {split} part (a folder {folder} next to train/, {table}): {cure}"


def _open_several(data: Sequence[str | Path], options: SourceOptions) -> Source:
    """Open each source; of splits other than train those that have one."""
    sources = given_sources([_named(one) for one in data])
    for message in (check_sources(sources), overlapping(sources)):
        if message is not None:
            warnings.warn(message, DMJDWarning, stacklevel=3)
    if len(sources) == 1:
        return open_source(sources[0].data, **vars(options))
    if options.masks:
        raise ValueError(f"images with masks come from one set, got several: {data_text([s.text for s in sources])}")
    opened = []
    for number, source in enumerate(sources):
        if options.split == "train" or has_split(source.data, options.split):
            listing = listing_of(options.listing, number) if options.listing is not None else None
            own = replace(options, listing=listing, labels=_labels_of(source.data, options))
            if own.labels == "folder":
                own = replace(own, label_column=None)
            opened.append((open_source(source.data, **vars(own)), source.weight))
    if unlabeled := [source.name for source, _ in opened if options.with_labels and source.labels is None]:
        raise ValueError(f"labels '{options.labels}': {unlabeled[0]} has none, so the classes of the others are no use")
    if len(opened) < 2:
        return opened[0][0] if opened else open_source(sources[0].data, **vars(options))  # whose message says why
    for each, _ in opened:
        if each.windows is not None:
            raise ValueError(
                f"windows of shards (--shard-window, or a cache that does not hold all of {printable(each.name)}) work "
                "for a single set: leave --shard-window out, give a larger --cache-gb, or one set"
            )
        each.full_names = True
    mixture = MixtureSource(*zip(*opened, strict=True))
    mixture.check_readable()
    return mixture


def _labels_of(data: str, options: SourceOptions) -> str:
    """Where a source of several has its labels, if they are wanted: folders and tables may stand side by side."""
    kind = _find(data, options.split) if options.with_labels else None
    return options.labels if kind is None or kind.label_option is None else kind.label_option


def has_split(data: str | Path | Sequence[str | Path], split: str) -> bool:
    """Whether :func:`open_source` finds this split; for a hub name the hub is queried. Of several, one must have it.

    Raises:
        ValueError: if a path does not exist.
    """
    if not isinstance(data, str | Path):
        return any(has_split(source.data, split) for source in given_sources([_named(one) for one in data]))
    name = _named(data)
    kind = _find(name, split)
    return kind is not None and kind.has_split(name, split)


def check_may_grow(data: Data) -> None:
    """Check, before anything is opened, that images may join each source while a run trains on it.

    Raises:
        ValueError: naming a source that does not grow, or does not exist.
    """
    for name in (_named(source.data) for source in given_sources(data)):
        kind = _find(name, "train")
        if kind is not None and (is_url(name) or not kind.may_grow):
            what = "remote" if is_url(name) else kind.kind
            raise ValueError(
                f"--data-may-grow is for folders and lists of images; {printable(name)} is {what}: leave it out"
            )


def absolute(data: str) -> str:
    """``data`` as a run stores it: paths made absolute, so that the run can be evaluated from any folder."""
    data = local_path(data)
    path = os.path.expanduser(data)
    if (
        data.strip()
        and not is_url(data)
        and data not in _names()
        and (os.path.exists(path) or path.lower().endswith(SHARDS) or glob.glob(path))
    ):
        return os.path.abspath(path)
    return data


def absolute_sources(data: Data) -> Data:
    """:func:`absolute` of each source; checks their weights.

    Raises:
        ValueError: see :func:`~dmjd.config.sources.check_sources`.
    """
    if isinstance(data, str):
        return absolute(data)
    sources = given_sources(data)
    check_sources(sources)
    return tuple(source._replace(data=absolute(source.data)).text for source in sources)


def _named(data: str | Path) -> str:
    """A name or path as a string; a Path is never the name of a set."""
    return os.path.join(".", data) if isinstance(data, Path) and str(data) in _names() else local_path(str(data))


def align_labels(train: Source, test: Source) -> np.ndarray:
    """The test set's labels as indices into the training set's classes, [n] int64.

    Raises:
        ValueError: if a set has no labels, or the training set lacks a class of the test set.
    """
    for source in (train, test):
        if source.labels is None:
            raise ValueError(f"{source.name} has no labels: pass --labels folder or --labels column")
    assert test.labels is not None
    index_of = {name: index for index, name in enumerate(train.classes)}
    unknown = [test.classes[i] for i in np.unique(test.labels) if test.classes[i] not in index_of]
    if unknown:
        theirs, known = (", ".join(map(printable, names[:10])) for names in (unknown, train.classes))
        raise ValueError(f"classes of {test.name} that {train.name} does not have: {theirs}; it has {known}")
    return np.array([index_of.get(name, -1) for name in test.classes], dtype=np.int64)[test.labels]


def _names() -> list[str]:
    """Reserved names of sets."""
    return [name for kind in SOURCES for name in kind.names]


def _find(data: str, split: str) -> type[Source] | None:
    """The first kind of source that matches, or None for an existing path without this split.

    Raises:
        ValueError: if a path does not exist.
    """
    if is_url(data):
        check_whole(data)
    if data in _names():
        return next((kind for kind in SOURCES if data in kind.names and kind.matches(data, split)), None)
    kind = next((kind for kind in SOURCES if kind.matches(data, split)), None)
    if is_url(data):
        if not ends_with(data, (*SHARDS, *COMPRESSED, *ENDINGS)):
            what = "give that of .tar, .zip or .parquet files, or of a list (.txt, .csv, .tsv, .jsonl)"
            raise ValueError(f"{printable(data)} is the address of no images: {what}")
        return kind
    if (kind is None or kind.remote) and existing_path(data) is None and not is_shards(data, "train"):
        _check_spelling(data, is_name=kind is not None)
    return kind


def _check_spelling(data: str, is_name: bool) -> None:
    """Raise an error for a misspelled path or name, which could be mistaken for the name of a remote set."""
    path = expanded(data)
    if os.path.exists(expanded((given := given_sources([data]))[0].data)):
        check_sources(given)  # a weight, which means nothing for a single set
    with permission_checked(path):
        nearby = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if path.parent == Path():
        nearby += _names()
    close = difflib.get_close_matches(path.name, nearby, n=1, cutoff=0.75)
    known_ending = path.suffix.lower() in (*EXTENSIONS, *ENDINGS, *SHARDS)
    beside_files = path.parent != Path() and path.parent.is_dir()
    if close or known_ending or beside_files or not is_name:
        other = printable(path.parent / close[0]) if close else ""
        hint = (
            f"did you mean {other}?"
            if close
            else "give a folder of images, a list of images (.txt, .csv) or a .parquet file"
        )
        raise ValueError(f"there is no {printable(data)}: {hint}")


def _check_options(split: str, labels: str, in_chans: int, label_column: str | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got '{labels}'")
    if label_column is not None and labels == "folder":
        raise ValueError("labels come from folders or from a column: give --labels folder or --label-column, not both")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
