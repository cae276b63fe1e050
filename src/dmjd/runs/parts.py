"""Checkpoints in parts: how processes write them, and how they are deleted. :mod:`dmjd.encoders.parts` reads them."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed
from torch import Tensor

from dmjd.encoders.headers import read_header
from dmjd.encoders.parts import PARTS, Part, parts_of
from dmjd.engine.processes import gather, num_processes
from dmjd.engine.sharding import own_part
from dmjd.files import make_folder, read_digest, remove, write_safetensors


def write_parts(checkpoints: Path, name: str, tensors: Mapping[str, Tensor]) -> list[Part]:
    """Write the part of this process; all processes call it. They belong to no checkpoint yet.

    Args:
        checkpoints: folder of the checkpoints.
        name: begin of the names of the files: that of the checkpoint, and something new. The same in all processes.
        tensors: divided ones, and whole ones, which the first process writes.

    Returns:
        The parts, by rank.

    Raises:
        ValueError: in all processes, if one of them could not write its part.
    """
    rank, count = torch.distributed.get_rank(), num_processes()
    file = checkpoints / PARTS / f"{name}.{rank + 1}-of-{count}.safetensors"
    own = {key: own_part(value) for key, value in tensors.items()}
    problem = None
    try:
        make_folder(file.parent)
        write_safetensors(file, {key: value for key, value in own.items() if value is not None}, {"part": rank + 1})
    except ValueError as error:
        problem = str(error)
    written = gather((Part(file=file.name, digest=read_digest(file) or ""), problem))
    problems = [problem for _, problem in written if problem is not None]
    if problems:
        remove(file)
        raise ValueError(problems[0])
    return [part for part, _ in written]


def check_parts(checkpoints: Path, parts: list[Part]) -> None:
    """Check that this process sees the parts that others wrote.

    Raises:
        ValueError: if it does not.
    """
    for part in parts:
        if read_digest(checkpoints / PARTS / part["file"]) != part["digest"]:
            raise ValueError(
                f"{checkpoints / PARTS / part['file']}, which another process wrote, is not seen by the first one: "
                "--checkpoint-type sharded needs a run folder on a file system that all machines share"
            )


def remove_unused_parts(checkpoints: Path) -> None:
    """Delete the parts that belong to no checkpoint, besides those of a checkpoint that cannot be read.

    A copy of a checkpoint under another name, which the run does not delete, keeps its parts.
    """
    used, readable = set(), set()
    for file in checkpoints.glob("*.safetensors"):
        try:
            used |= {part["file"] for part in parts_of(file, read_header(file).metadata)}
            readable.add(file.stem)
        except ValueError:
            continue
    for file in (checkpoints / PARTS).glob("*.safetensors"):
        stem = file.name.partition(".")[0]
        if file.name not in used and (stem in readable or not (checkpoints / f"{stem}.safetensors").exists()):
            remove(file)
