"""Checkpoints in parts: every process of a run wrote a part of each tensor, as a safetensors file of its own.

The file of such a checkpoint has the metadata and no tensors; it names its parts, which are in the folder ``parts``
beside it, in order. A tensor is that of one part, or it is divided among them along its first dimension.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict

import torch
from torch import Tensor

from dmjd.checked_json import check_json
from dmjd.config.checks import shown
from dmjd.encoders.headers import FORMAT_IN_PARTS
from dmjd.files import read_digest, read_safetensors

PARTS: Final = "parts"  # a folder beside checkpoints, and the key in their metadata

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*\.safetensors")


class Part(TypedDict):
    """A file in the folder of parts, and the digest that it holds."""

    file: str
    digest: str


class _Index(TypedDict):
    """The part of a checkpoint's metadata that is read here."""

    parts: list[Part]


class JoinedTensors(Mapping[str, Tensor]):
    """Tensors by name, of which each is put together when it is read.

    Args:
        pieces: by name, in order.
    """

    def __init__(self, pieces: Mapping[str, Sequence[Tensor]]) -> None:
        self._pieces = dict(pieces)

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def under(self, prefix: str) -> "JoinedTensors":
        """Those whose names begin with a prefix, under the rest of their names."""
        own = {key: pieces for key, pieces in self._pieces.items() if key.startswith(prefix)}
        return JoinedTensors({key.removeprefix(prefix): pieces for key, pieces in own.items()})

    def clear(self) -> None:
        """Forget all."""
        self._pieces.clear()


def parts_of(checkpoint: Path, metadata: Mapping[str, Any]) -> list[Part]:
    """The parts that the metadata of a checkpoint name; none if it is in one file.

    Raises:
        ValueError: if they name none, or anything but files of the folder of parts.
    """
    if metadata.get("format") != FORMAT_IN_PARTS:
        return []
    parts = check_json(dict(metadata), _Index, str(checkpoint))[PARTS]
    if not parts:
        raise ValueError(f"{checkpoint} names none of its parts")
    for part in parts:
        if not _NAME.fullmatch(part["file"]):
            raise ValueError(f"{checkpoint}: {shown(part['file'])} is not the name of a part of a checkpoint")
    return parts


def read_tensors(
    file: Path, kind: str = "safetensors file"
) -> tuple[dict[str, Tensor] | JoinedTensors, dict[str, Any]]:
    """:func:`read_safetensors` of a file that may be a checkpoint in parts, whose tensors are put together when read.

    Raises:
        ValueError: if the file or a part is missing, damaged, or does not fit the others.
    """
    tensors, metadata = read_safetensors(file, kind)
    if "progress" not in metadata or not (parts := parts_of(file, metadata)):
        return tensors, metadata
    pieces: dict[str, list[Tensor]] = {name: [value] for name, value in tensors.items()}
    for part in parts:
        path = file.parent / PARTS / part["file"]
        if not os.path.exists(path):  # unlike Path.exists, no error where it cannot be found out
            raise ValueError(f"{file} lacks its part {path}, or may not see it: copy the folder {PARTS} with it")
        if read_digest(path) != part["digest"]:
            raise ValueError(f"{path} is damaged or belongs to another checkpoint than {file}")
        for name, value in read_safetensors(path, f"part of {file}")[0].items():
            pieces.setdefault(name, []).append(value)
    for name, values in pieces.items():
        kinds = {(value.dtype, value.ndim, value.shape[1:]) for value in values}
        if len(values) > 1 and (len(kinds) > 1 or values[0].ndim == 0):
            raise ValueError(f"the parts of {file} do not fit each other: {shown(name)}")
    return JoinedTensors(pieces), metadata
