"""Image sets from the Hugging Face hub, or from its local cache, through the ``datasets`` library."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from dmjd.config.checks import shown
from dmjd.data.sources.base import SourceOptions
from dmjd.data.sources.paths import existing_path
from dmjd.data.sources.tables import TableSource, check_cache, first_line
from dmjd.hub import offline_if_unreachable

_VALIDATION = ("validation", "valid", "val", "dev")

_SPLITS = {"train": ("train",), "val": _VALIDATION, "test": ("test", *_VALIDATION)}  # the first that exists

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class HubSource(TableSource):
    """A split of a hub dataset; "test" is its test split, else its validation split."""

    kind = "the name of a hub dataset"
    label_option = "column"
    remote = True

    @classmethod
    def matches(cls, data: str, split: str) -> bool:
        """Whether ``data`` has the form of a name and is not a path."""
        return existing_path(data) is None and _NAME.fullmatch(data) is not None

    @classmethod
    def has_split(cls, data: str, split: str) -> bool:
        """Whether the hub has this split of the set.

        Raises:
            ValueError: if the hub or the set cannot be reached.
        """
        return any(name in _split_names(data) for name in _SPLITS[split])

    @classmethod
    def from_data(cls, data: str, options: SourceOptions) -> "HubSource":
        """Open a split of the set ``data``, which is downloaded at first use.

        Raises:
            ValueError: if the hub or the set cannot be reached or has no such split; see also :class:`TableSource`.
        """
        import datasets  # slow to import
        import huggingface_hub.constants as hub

        check_cache()
        names = _split_names(data)
        split = next((name for name in _SPLITS[options.split] if name in names), None)
        if split is None:
            raise ValueError(f"{data} has no {options.split} split, only {', '.join(names)}: pass --test-data")
        with _hub_errors(data):
            table = datasets.load_dataset(data, split=split)
        caches = [Path(folder) for folder in (datasets.config.HF_DATASETS_CACHE, hub.HF_HUB_CACHE)]
        source = cls(table, data, [(f"{data} ({split})", len(table))], Path(), options, caches)
        source.split = "val" if split in _VALIDATION else split
        return source


def _split_names(data: str) -> list[str]:
    """Names of the splits of a set on the hub."""
    import datasets  # slow to import

    with _hub_errors(data):
        return list(datasets.get_dataset_split_names(data))


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn all errors into one message."""
    reachable = True
    try:
        with offline_if_unreachable() as reachable:
            yield
    except Exception as error:  # dozens of types, from the socket to the set's own files
        reason = first_line(error) if reachable else "it cannot be reached, and the set is not in its cache"
        raise ValueError(
            f"{shown(name)} is not a file, folder or known set, and could not be loaded from the Hugging Face hub "
            f"({reason}): check the name and the network, or give a folder or a .parquet file"
        ) from None
