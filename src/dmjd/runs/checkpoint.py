"""Run folders and checkpoints.

A checkpoint is one safetensors file: tensors of model and optimizer, everything else as JSON in its metadata. Loading
it runs no code. Random states are not saved: randomness is a function of seed and step (see :mod:`dmjd.rng`).
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmjd.config.checks import check_path
from dmjd.config.pretrain import PretrainConfig, resume_differences
from dmjd.files import read_safetensors, write_safetensors, write_text

FORMAT_VERSION = 1

KEEP = 2  # step checkpoints, besides the final one

FINAL = "final.safetensors"

ORPHANS_SECONDS = 30.0  # worker processes check every five seconds whether their parent is alive


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: ``tensors`` under ``model.*``, ``optimizer.*``, ..., and ``state`` as JSON types."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under ``name.``, without the prefix."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; a full disk or a kill never damages an earlier one."""
    write_safetensors(path, tensors, {"format": FORMAT_VERSION} | state)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: for a truncated file, another kind of file, or another format version.
    """
    tensors, state = read_safetensors(path, kind="checkpoint")
    if state.get("format") != FORMAT_VERSION or "progress" not in state:
        raise ValueError(f"{path} is not a dmjd checkpoint of format {FORMAT_VERSION}")
    return Checkpoint(path, tensors, state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as ``<parameter index>.<name>``; parameter groups follow from the configuration."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`."""
    whole = optimizer.state_dict()
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": whole["param_groups"]})


def named_tensors(part: str, module: nn.Module) -> dict[str, Tensor]:
    """State of a module as a checkpoint holds it, under ``<part>.<key>``."""
    return {f"{part}.{key}": value for key, value in module.state_dict().items()}


def _is_dead(owner: str) -> bool:
    """Whether a lock names a process of this machine that no longer exists."""
    process, _, machine = owner.partition(" ")
    if machine != platform.node() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists and belongs to another user
        return False
    return False


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
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file; give a folder for the run")
        self.checkpoints = self.path / "checkpoints"
        if not owner:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", encoding="utf-8")  # "w" would erase the name of another owner
        except OSError as error:
            raise ValueError(f"--out {self.path} cannot be written: {error.strerror}") from None
        if not self._locked():
            self._lock.close()
            raise ValueError(f"another process is training in {self.path}; wait for it or give another --out")
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} {platform.node()}")
        self._lock.flush()

    def _locked(self) -> bool:
        """Take the lock; if its owner was killed, wait for the worker processes it left behind, which still hold it."""
        until = time.monotonic() + ORPHANS_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                self._lock.seek(0)
                if time.monotonic() > until or not _is_dead(self._lock.read()):
                    return False
                time.sleep(0.1)

    def close(self) -> None:
        """Release the lock."""
        if self.owner:
            self._lock.close()

    @property
    def metrics(self) -> Path:
        """The metrics file, one JSON object per line."""
        return self.path / "metrics.jsonl"

    def validate_config(self, config: PretrainConfig) -> None:
        """Check that a configuration continues the run in this folder, if there is one, and write it.

        Raises:
            ValueError: naming the settings that differ, or if the folder holds a run and resuming is off.
        """
        file = self.path / "config.json"
        if file.exists():
            try:
                old = PretrainConfig.from_json(file.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is not a run's configuration ({error}); give another --out") from None
            if not config.resume:
                raise ValueError(f"{self.path} holds a run already and --no-resume was given; give another --out")
            if lines := resume_differences(old, config):
                listed = "\n  ".join(lines[:6])
                raise ValueError(
                    f"{self.path} holds a run with other settings; use them, or another --out:\n  {listed}"
                )
        elif self.files():
            raise ValueError(f"{self.path} holds checkpoints but no config.json; give another --out")
        write_text(file, config.to_json())

    def files(self) -> list[Path]:
        """Step checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"), key=lambda p: int(re.sub(r"\D", "", p.stem) or 0))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest readable checkpoint, or None, and the errors of newer ones.

        Raises:
            ValueError: if there are checkpoints and none is readable.
        """
        final = [self.checkpoints / FINAL] if (self.checkpoints / FINAL).exists() else []
        problems = []
        found = []
        for file in final + self.files()[::-1]:
            try:
                found.append(load_checkpoint(file))
            except ValueError as error:
                problems.append(str(error))
                continue
            if file.name != FINAL:
                break  # after the duration was extended, the final checkpoint is older than step files
        if problems and not found:
            raise ValueError(
                "no checkpoint can be read; start again with another --out:\n  " + "\n  ".join(problems[:5])
            )
        return max(found, key=lambda c: c.state["progress"]["step"], default=None), problems

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], final: bool = False) -> Path:
        """Write a checkpoint, then delete all but the last two step files."""
        file = self.checkpoints / (FINAL if final else f"step-{step:09d}.safetensors")
        save_checkpoint(file, tensors, state)
        for old in self.files()[:-KEEP]:
            old.unlink()
        return file

    def cut_metrics(self, step: int) -> None:
        """Delete the metrics of steps after ``step``, which will be repeated."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave an incomplete line
                if json.loads(line).get("step", 0) <= step:
                    lines.append(line + "\n")
        write_text(self.metrics, "".join(lines))

    def log(self, values: dict[str, Any]) -> None:
        """Append one line of metrics."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise ValueError(f"could not write {self.metrics}: {error.strerror}; what was saved is untouched") from None
