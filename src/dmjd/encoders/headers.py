"""Checkpoints and encoder file of a run, known by their headers: which is the newest, and whether the two agree."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from dmjd.checked_json import check_json
from dmjd.files import read_metadata

CHECKPOINT_FORMAT = 1

FORMAT_IN_PARTS = 2  # of a checkpoint whose tensors are in other files, see dmjd.encoders.parts

CHECKPOINTS = "checkpoints"  # folder of the checkpoints in a run folder

FINAL = "final.safetensors"

STABLE = "before-cooldown.safetensors"  # the state before the learning rate falls, from which a run can be prolonged

COOLING_KEY = "cooling"  # in the metadata of a checkpoint: its learning rate has begun to fall

# In the metadata of a checkpoint: the weights_hash of its encoder, and the digest of the encoder file of the same step.
WEIGHTS_KEY, ENCODER_DIGEST_KEY = "weights", "encoder_file"

# In the metadata of a checkpoint: size of the set that is trained on, and the device, in words.
NUM_IMAGES_KEY, DEVICE_KEY = "num_images", "device"


class Progress(TypedDict):
    """The loop's state in a checkpoint."""

    step: int
    images: NotRequired[int]
    seconds: NotRequired[float]


class CheckpointState(TypedDict):
    """What the metadata of every checkpoint holds."""

    format: int
    progress: Progress


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint: its file, its step and its metadata."""

    path: Path
    step: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A checkpoint whose header is damaged. ``step`` is None if the name does not tell it."""

    step: int | None
    reason: str

    def newer_than(self, step: int) -> bool:
        """Whether it may be newer than a step."""
        return self.step is None or self.step > step


def read_header(path: Path) -> Header:
    """Read the header of a checkpoint.

    Raises:
        ValueError: for a damaged file, another kind of file, or another format version.
    """
    return Header(path, check_checkpoint(path, metadata := read_metadata(path, kind="checkpoint")), metadata)


def check_checkpoint(path: Path, metadata: dict[str, Any]) -> int:
    """Check the metadata that all checkpoints have; returns the step."""
    formats = (CHECKPOINT_FORMAT, FORMAT_IN_PARTS)
    if metadata.get("format") not in formats or "progress" not in metadata:
        raise ValueError(f"{path} is not a dmjd checkpoint of format {' or '.join(map(str, formats))}")
    return check_json(metadata, CheckpointState, str(path))["progress"]["step"]


def has_checkpoint(run: Path) -> bool:
    """Whether a folder is a run with a checkpoint, readable or not."""
    return any((run / CHECKPOINTS).glob("*.safetensors"))


def step_files(folder: Path) -> list[Path]:
    """Step checkpoints in a folder of checkpoints, oldest first."""
    return sorted(folder.glob("step-*.safetensors"), key=_step_of)


def _step_of(file: Path) -> int:
    digits = file.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() and len(digits) < 20 else 0


def read_headers(folder: Path) -> tuple[list[Header], list[Unreadable]]:
    """The headers in a folder of checkpoints, newest first, and the checkpoints that cannot be read.

    The final checkpoint is the oldest of all after the duration of a run was extended.
    """
    final, stable = ([folder / name] if os.path.lexists(folder / name) else [] for name in (FINAL, STABLE))
    headers, unreadable = [], []
    for file in final + step_files(folder)[::-1] + stable:
        try:
            headers.append(read_header(file))
        except ValueError as error:
            unreadable.append(Unreadable(None if file.name == FINAL else _step_of(file), str(error)))
    return sorted(headers, key=lambda header: -header.step), unreadable
