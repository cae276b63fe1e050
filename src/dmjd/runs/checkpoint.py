"""Files that survive: atomic writes, a run folder with one owner, checkpoints that hold the whole state.

A checkpoint is one safetensors file: tensors of model and optimizer, everything else as JSON in its metadata. Loading
runs no code from it. Randomness needs no saving: it is a function of seed and step (see :mod:`dmjd.nn.tokens`).
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
from torch import Tensor

from dmjd.config.pretrain import PretrainConfig, resume_differences
from dmjd.files import read_safetensors, write_safetensors, write_text

FORMAT_VERSION = 1

KEEP = 2  # step checkpoints; the final one is kept besides

FINAL = "final.safetensors"

ORPHANS_SECONDS = 30.0  # reading processes look every five seconds whether their owner is alive


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: tensors under ``model.*`` and ``optimizer.*``, and JSON-able ``state``."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under ``name.``, the prefix removed."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; a full disk or a kill never harms an earlier one."""
    write_safetensors(path, tensors, {"format": FORMAT_VERSION} | state)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: for a file that is cut short, of another kind, or of another format version.
    """
    tensors, state = read_safetensors(path, kind="checkpoint")
    if state.get("format") != FORMAT_VERSION or "progress" not in state:
        raise ValueError(f"{path} is not a dmjd checkpoint of format {FORMAT_VERSION}")
    return Checkpoint(path, tensors, state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as a flat dict ``<parameter index>.<name>``; the groups follow from the configuration."""
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


def _is_dead(owner: str) -> bool:
    """Whether a lock file names a process of this machine that is no more."""
    process, _, machine = owner.partition(" ")
    if machine != platform.node() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, someone else's
        return False
    return False


class RunFolder:
    """One run's folder: configuration, lock, metrics, checkpoints.

    Args:
        path: the folder; made if need be.
        owner: whether this process writes to it and keeps others out; the other processes of a run only read.

    Raises:
        ValueError: when the path is a file, cannot be written, or another process trains in it.
    """

    def __init__(self, path: str | Path, owner: bool = True) -> None:
        self.path, self.owner = Path(path).expanduser(), owner
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file; give a folder for the run")
        self.checkpoints = self.path / "checkpoints"
        if not owner:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", encoding="utf-8")  # keeps what another owner wrote
        except OSError as error:
            raise ValueError(f"--out {self.path} cannot be written: {error.strerror}") from None
        if not self._locked():
            self._lock.close()
            raise ValueError(f"another process is training in {self.path}; wait for it or give another --out")
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} {platform.node()}")
        self._lock.flush()

    def _locked(self) -> bool:
        """Take the lock; where its owner was killed, wait for the reading processes it leaves behind."""
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
        """Let go of the lock."""
        if self.owner:
            self._lock.close()

    @property
    def metrics(self) -> Path:
        """The metrics file, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def settle(self, config: PretrainConfig) -> None:
        """Write the configuration, or check that it continues the run that is here.

        Raises:
            ValueError: naming the settings that differ, or that resuming was refused.
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
        """The newest checkpoint that can be read, and what was wrong with newer ones.

        Raises:
            ValueError: when there are checkpoints and none can be read.
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
                break  # step files are in order; only the final one may be older, from before a longer duration
        if problems and not found:
            raise ValueError(
                "no checkpoint can be read; start again with another --out:\n  " + "\n  ".join(problems[:5])
            )
        return max(found, key=lambda c: c.state["progress"]["step"], default=None), problems

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], final: bool = False) -> Path:
        """Write a checkpoint, then drop all but the last two step files."""
        file = self.checkpoints / (FINAL if final else f"step-{step:09d}.safetensors")
        save_checkpoint(file, tensors, state)
        for old in self.files()[:-KEEP]:
            old.unlink()
        return file

    def cut_metrics(self, step: int) -> None:
        """Drop metrics of steps after ``step``: they will be made again."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a line
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
