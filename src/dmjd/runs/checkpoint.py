"""Run folders and checkpoints.

A checkpoint is one safetensors file: tensors of model and optimizer, everything else as JSON in its metadata. Loading
it runs no code. Random states are not saved: randomness is a function of seed and step (see :mod:`dmjd.rng`). The
tensors of a sharded model may be in files of their own, one of each process (see :mod:`dmjd.encoders.parts`).
"""

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from dmjd.checked_json import check_json
from dmjd.config.checks import check_path
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import resume_differences
from dmjd.encoders.headers import (
    CHECKPOINT_FORMAT,
    CHECKPOINTS,
    FINAL,
    FORMAT_IN_PARTS,
    STABLE,
    check_checkpoint,
    read_headers,
    step_files,
)
from dmjd.encoders.parts import PARTS, JoinedTensors, Part, parts_of, read_tensors
from dmjd.encoders.weights import ENCODER_FILE, EncoderMetadata
from dmjd.engine.console import Console
from dmjd.engine.sharding import divided_like
from dmjd.files import (
    append_lines,
    check_replaceable,
    remove,
    remove_leftovers,
    try_lock,
    write_safetensors,
    write_text,
)
from dmjd.images.preprocess import Preprocess
from dmjd.regular import check_regular
from dmjd.runs.metrics import cut_metrics
from dmjd.runs.owner import LOCK, Owner
from dmjd.runs.parts import remove_unused_parts
from dmjd.warning import DMJDWarning

KEEP = 2  # step checkpoints, besides the final one

CONFIG_FILE = "config.json"

_SHOWN = 6  # settings in an error

# Files of a run that are written late.
_WRITTEN = ("metrics.jsonl", f"{CHECKPOINTS}/{FINAL}", f"{CHECKPOINTS}/{STABLE}", ENCODER_FILE, "unreadable.txt")

ORPHANS_SECONDS = 30.0  # worker processes check every five seconds whether their parent is alive


class ModelState(TypedDict):
    """What the metadata of a pre-training checkpoint holds about the model."""

    encoder: EncoderMetadata
    config: dict[str, Any]


class PretrainState(ModelState):
    """What the metadata of a pre-training checkpoint holds besides that of every checkpoint."""

    weights: NotRequired[str]  # hash of the encoder's
    encoder_file: NotRequired[str]  # digest of the encoder file that belongs to it
    data: str  # fingerprint
    num_images: NotRequired[int]
    content: NotRequired[list[tuple[int, str]]]  # index and hash of sampled images
    bad: list[tuple[str, str]]  # unreadable images
    joined: NotRequired[int]  # images that had joined the set
    scaler: NotRequired[dict[str, Any] | None]
    cooling: NotRequired[bool]  # the learning rate has begun to fall, with the schedule wsd


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: ``tensors`` under ``model.*``, ``optimizer.*``, ..., and ``state`` as JSON types."""

    path: Path
    tensors: dict[str, Tensor] | JoinedTensors
    state: dict[str, Any]

    def part(self, name: str) -> Mapping[str, Tensor]:
        """The tensors under ``name.``, without the prefix."""
        prefix = f"{name}."
        if isinstance(self.tensors, JoinedTensors):
            return self.tensors.under(prefix)
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def preprocess(self) -> Preprocess:
        """The preprocessing of the encoder of a pre-training run; ValueError if it is damaged."""
        values = check_json(self.state["encoder"]["preprocess"], dict[str, Any], str(self.path))
        try:
            return Preprocess.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], parts: Sequence[Part] = ()
) -> None:
    """Write a checkpoint atomically; a full disk or a kill never damages an earlier one.

    Args:
        path: its file.
        tensors: by name; none if they are in parts.
        state: JSON types.
        parts: what :func:`dmjd.runs.parts.write_parts` wrote.
    """
    kind = {"format": FORMAT_IN_PARTS, PARTS: list(parts)} if parts else {"format": CHECKPOINT_FORMAT}
    write_safetensors(path, tensors, {**state, **kind})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: for a damaged file, another kind of file, or another format version.
    """
    tensors, state = read_tensors(path, kind="checkpoint")
    check_checkpoint(path, state)
    return Checkpoint(path, tensors, state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as ``<parameter index>.<name>``; parameter groups follow from the configuration.

    Of a sharded model, these are the parts that this process holds.
    """
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`; KeyError for a state that is not of this optimizer."""
    whole = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isdecimal() and int(index) < len(parameters)) or (
            value.ndim and value.shape != parameters[int(index)].shape
        ):
            raise KeyError(f"optimizer.{key}")
        entries.setdefault(int(index), {})[name] = divided_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": entries, "param_groups": whole["param_groups"]})


def one_line(error: Exception) -> str:
    """The message of an error that PyTorch raised while it loaded a state: its last line, which tells the most."""
    lines = str(error).split("\n") if isinstance(error, RuntimeError) else [" ".join(str(error).split("\n"))]
    return lines[-1].strip() or type(error).__name__


def named_tensors(part: str, module: nn.Module) -> dict[str, Tensor]:
    """State of a module as a checkpoint holds it, under ``<part>.<key>``."""
    return {f"{part}.{key}": value for key, value in module.state_dict().items()}


class RunFolder:
    """The folder of a training: configuration, lock, metrics, checkpoints.

    Args:
        path: the folder; created if missing.
        owner: whether this process writes to the folder and locks it; the other processes of a run only read.

    Raises:
        ValueError: if the path is a file, cannot be written to, or is used by another process.
    """

    def __init__(self, path: str | Path, owner: bool = True) -> None:
        self.path, self.owner = check_path("out", path), owner
        self._unwritten: list[str] = []  # lines of metrics
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file; give a folder for the run")
        self.checkpoints = self.path / CHECKPOINTS
        if not owner:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = self._take_lock(self.path / LOCK)
            if lock is None:
                raise ValueError(f"another process is training in {self.path}; wait for it or give another --out")
            lock.truncate(0)
            lock.write(Owner.this_process().to_text())
            lock.flush()
        except OSError as error:
            named = f" ({error.filename})" if error.filename else ""
            raise ValueError(f"--out {self.path} cannot be written: {error.strerror}{named}") from None
        self._lock = lock
        for file in (*(self.path / name for name in _WRITTEN), *self.files()):
            check_replaceable(file)  # before the work
        for folder in (self.path, self.checkpoints, self.checkpoints / PARTS, self.path / "figures"):
            remove_leftovers(folder)
        remove_unused_parts(self.checkpoints)

    def _take_lock(self, file: Path) -> IO[str] | None:
        """Take the lock; if its owner was killed, wait for the worker processes it left behind, which still hold it."""
        until = time.monotonic() + ORPHANS_SECONDS
        while (lock := try_lock(file)) is None:
            owner = Owner.read(file)
            if time.monotonic() > until or owner is None or not owner.is_dead():
                return None
            time.sleep(0.1)
        return lock

    def close(self) -> None:
        """Release the lock."""
        if self.owner:
            self._lock.close()

    @property
    def metrics(self) -> Path:
        """The metrics file, one JSON object per line."""
        return self.path / "metrics.jsonl"

    def validate_config(self, config: PretrainConfig) -> None:
        """Write a configuration; ValueError as of :func:`check_continues`."""
        check_continues(self.path, config)
        write_text(self.path / CONFIG_FILE, config.to_json())

    def files(self) -> list[Path]:
        """Step checkpoints, oldest first."""
        return step_files(self.checkpoints)

    def newest(self, schema: Any = dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
        """The newest readable checkpoint, or None, and the errors of newer ones.

        Args:
            schema: type of the state, besides what all checkpoints hold.

        Raises:
            ValueError: if there are checkpoints and none is readable.
        """
        headers, unreadable = read_headers(self.checkpoints)
        problems = []
        for header in headers:
            try:
                checkpoint = load_checkpoint(header.path)
                check_json(checkpoint.state, schema, str(header.path))
            except ValueError as error:
                problems.append(str(error))
                continue
            return checkpoint, [one.reason for one in unreadable if one.newer_than(header.step)] + problems
        problems += [one.reason for one in unreadable]
        if problems:
            raise ValueError(
                "no checkpoint can be read; start again with another --out:\n  " + "\n  ".join(problems[:5])
            )
        return None, []

    def file(self, step: int, final: bool = False, stable: bool = False) -> Path:
        """The file of a checkpoint; see :meth:`save`."""
        return self.checkpoints / (FINAL if final else STABLE if stable else f"step-{step:09d}.safetensors")

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        final: bool = False,
        stable: bool = False,
        parts: Sequence[Part] = (),
    ) -> Path:
        """Write a checkpoint, then delete all but the last two step files, and the parts that belong to none.

        Args:
            step: its step.
            tensors, state: its content.
            final: whether the run is over.
            stable: whether it is the state before the cooldown, which is kept until there is a later one.
            parts: what :func:`dmjd.runs.parts.write_parts` wrote for it.

        Returns:
            Its file.
        """
        file = self.file(step, final, stable)
        save_checkpoint(file, tensors, state, parts)
        for old in self.files()[:-KEEP]:
            remove(old)
        remove_unused_parts(self.checkpoints)
        return file

    def join_parts(self) -> None:
        """Write the checkpoints whose tensors are in parts as one file each, which takes main memory for all of them.

        Raises:
            ValueError: if a checkpoint is damaged or cannot be written; those before it were.
        """
        for header in read_headers(self.checkpoints)[0]:
            if parts_of(header.path, header.metadata):
                checkpoint = load_checkpoint(header.path)
                del checkpoint.state[PARTS]
                save_checkpoint(header.path, checkpoint.tensors, checkpoint.state)
        remove_unused_parts(self.checkpoints)

    def cut_metrics(self, step: int) -> int:
        """Delete the metrics of steps after ``step``; see :func:`dmjd.runs.metrics.cut_metrics`."""
        return cut_metrics(self.metrics, step)

    def log(self, values: dict[str, Any]) -> None:
        """Append one line of metrics. One that cannot be written is kept, and written together with the next."""
        self._unwritten.append(json.dumps(values))
        append_lines(self.metrics, self._unwritten)
        self._unwritten = []


def newest_checkpoint(folder: RunFolder, console: Console, schema: Any) -> Checkpoint | None:
    """The newest readable checkpoint of a folder, with a warning for each newer one that is damaged.

    Args:
        folder: the folder.
        console: for the warnings.
        schema: type of the state; see :meth:`RunFolder.newest`.
    """
    checkpoint, problems = folder.newest(schema)
    for problem in problems:
        console.warn(f"{problem}; resuming from an older one")
    return checkpoint


def check_continues(run: Path, config: PretrainConfig) -> None:
    """Check that a configuration continues the run in a folder, if there is one. Nothing is written.

    Raises:
        ValueError: naming the settings that differ, or if the folder holds a run and resuming is off.
    """
    old = read_config_of(run)
    if old is None:
        return
    if not config.resume:
        raise ValueError(f"{run} holds a run already and --no-resume was given; give another --out")
    if lines := resume_differences(old, config):
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        listed = "\n  ".join([*lines[:_SHOWN], *more])
        raise ValueError(f"{run} holds a run with other settings; use them, or another --out:\n  {listed}")


def read_config_of(run: Path) -> PretrainConfig | None:
    """The configuration of a run folder; None if there is neither a configuration nor a checkpoint.

    A file that is missing or damaged is replaced by the configuration in the newest checkpoint, with a warning.

    Raises:
        ValueError: if there is no readable configuration.
    """
    file = run / CONFIG_FILE
    try:
        check_regular(file)
        return PretrainConfig.from_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        problem = f"{file} is missing"
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror}"
    except ValueError as error:
        problem = f"{file} is not a run's configuration ({str(error).removeprefix(f'{file}: ')})"
    headers, unreadable = read_headers(run / CHECKPOINTS)
    for header in headers:
        if isinstance(stored := header.metadata.get("config"), dict):
            warnings.warn(f"{problem}. The configuration is taken from {header.path}", DMJDWarning, stacklevel=3)
            return PretrainConfig.from_json(json.dumps(stored), str(header.path))
    if not file.exists() and not headers and not unreadable:
        return None
    why = f" ({unreadable[0].reason})" if unreadable else ""
    raise ValueError(f"{problem}, and no checkpoint replaces it{why}; give another --out")
