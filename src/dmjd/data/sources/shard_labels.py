"""Labels of the images in shards: the first folder of their names, or members such as ``a.cls`` next to ``a.jpg``."""

import json
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from dmjd.data.sources.shard_index import Extent, ShardIndex
from dmjd.data.sources.shard_scan import LABELS
from dmjd.text import printable, shortened

_FIELDS = ("label", "cls")  # of a .json member

_MOST_CHARACTERS = 200  # of the name of a class


def folder_labels(index: ShardIndex, name: str) -> tuple[np.ndarray, list[str]]:
    """[n] int64 and the sorted class names: the first folder below the one that holds all images, as in lists.

    Raises:
        ValueError: if an image lies in no class folder.
    """
    names = list(chain.from_iterable(batch.column(0).to_pylist() for batch in index.batches))
    folders = [path.rpartition(b"/")[0] for path in names]
    parts = {folder: folder.split(b"/") for folder in set(folders)}
    ends = min(parts.values()), max(parts.values())  # what these two have in common, all have
    depth = next((i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), min(map(len, ends)))
    class_of = {folder: part[depth] for folder, part in parts.items() if len(part) > depth and folder}
    loose = [i for i, folder in enumerate(folders) if folder not in class_of]
    if loose:
        raise ValueError(
            f"{len(loose)} of {len(names)} images of {name} lie in no class folder, {_text(names[loose[0]])} for one: "
            "labels 'folder' are the folders in the shards, labels 'column' the members .cls, .json or .txt"
        )
    classes, labels = np.unique([_text(class_of[folder]) for folder in folders], return_inverse=True)
    return labels.astype(np.int64), [str(label) for label in classes]


def member_labels(
    index: ShardIndex,
    name: str,
    read: Callable[[int, Extent], bytes],
    describe: Callable[[int], str],
    field: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """[n] int64 and the sorted class names, from the members that hold labels.

    Args:
        index: the images.
        name: name of the set, for error messages.
        read: number of a shard and extent -> content of a member.
        describe: index of an image -> its name, for error messages.
        field: the field of .json members that holds the label; None: "label" or "cls".

    Raises:
        ValueError: if an image has no label, or it cannot be read or is no class.
    """
    kinds = np.concatenate([batch.column("label_kind").to_numpy() for batch in index.batches])
    missing = np.flatnonzero(kinds == 0)
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(kinds)} images of {name} have no label, {describe(int(missing[0]))} for one: "
            "labels 'column' need a member with the name of the image and the ending .cls, .json or .txt"
        )
    values: list[int | str] = []
    fields = _FIELDS if field is None else (field,)
    for shard, batch in enumerate(index.batches):
        extents = zip(
            *(batch.column(f"label_{part}").to_pylist() for part in ("offset", "packed", "size")), strict=True
        )
        for kind, extent in zip(batch.column("label_kind").to_pylist(), extents, strict=True):
            ending = LABELS[kind - 1]
            try:
                values.append(_value(read(shard, Extent(*extent)), ending, fields))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"the {ending} label of {describe(len(values))}: {reason}") from None
    return _classes(values)


def _classes(values: Sequence[int | str]) -> tuple[np.ndarray, list[str]]:
    """Numbers are sorted by value, if all labels are numbers."""
    numbers = all(isinstance(value, int) for value in values)
    classes, labels = np.unique(values if numbers else list(map(str, values)), return_inverse=True)
    return labels.astype(np.int64), [str(value) for value in classes]


def _value(content: bytes, ending: str, fields: Sequence[str]) -> int | str:
    """The label in a member; ValueError if it holds none."""
    try:
        text = content.decode("utf-8-sig").strip()
        value = _field(json.loads(text), fields) if ending == ".json" else text
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError):
        raise ValueError(f"it is no {'JSON' if ending == '.json' else 'UTF-8 text'}") from None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, int) and 0 <= value < 1 << 63:
        return value
    if isinstance(value, str) and value.strip() and "\n" not in value and len(value) <= _MOST_CHARACTERS:
        return value
    raise ValueError(f"{shortened(repr(value), 60)} is no class: a label is a whole number or a short text")


def _field(value: object, fields: Sequence[str]) -> object:
    """The label in the content of a .json member."""
    if isinstance(value, dict):
        named = [field for field in fields if field in value]
        if not named:
            raise ValueError(f"it has no field {' or '.join(fields)}")
        return value[named[0]]
    return value


def _text(name: bytes) -> str:
    return printable(name.decode("utf-8", "surrogateescape"))
