"""Weights in several files: an index names the file of each tensor, as transformers saves large models."""

import os
from collections import defaultdict
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from dmjd.checked_json import read_json
from dmjd.config.checks import shown
from dmjd.files import read_safetensors

INDEX = "model.safetensors.index.json"

_SUFFIX = ".safetensors"

_MOST_BYTES = 64 << 20  # of an index; a tensor takes about a hundred


class _Index(TypedDict):
    """The part of an index that is read."""

    weight_map: dict[str, str]


def read_index(index: Path) -> dict[str, list[str]]:
    """The files that an index names, and the tensors to read from each.

    Raises:
        ValueError: if the index is damaged, too large or empty, or names anything but files of its own folder.
    """
    if (size := index.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{index} is no index of weights: it has {size} bytes, more than {_MOST_BYTES}")
    tensors = defaultdict(list)
    for tensor, file in read_json(index, _Index)["weight_map"].items():
        tensors[file].append(tensor)
    if not tensors:
        raise ValueError(f"{index} names no weights")
    for file in tensors:
        if os.path.basename(file) != file or not file.endswith(_SUFFIX):
            raise ValueError(f"{index}: {shown(file)} is not the name of a {_SUFFIX} file in the same folder")
    return dict(tensors)


def read_shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors that an index names, one file after the other.

    Raises:
        ValueError: if the index or a file is missing or damaged, or a file lacks a tensor.
    """
    files = read_index(index)
    for file in files:
        if not os.path.exists(index.parent / file):
            raise ValueError(f"{index} names {shown(file)}, which is missing: copy all files of the model")
    state: dict[str, Tensor] = {}
    for file, tensors in files.items():
        content, _ = read_safetensors(index.parent / file)
        if lacking := [tensor for tensor in tensors if tensor not in content]:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(f"{index.parent / file} lacks {shown(lacking[0])}{more}, which {INDEX} says it holds")
        state |= {tensor: content[tensor] for tensor in tensors}
    return state
