"""The weights of a training, and the state of its optimizer, as evaluations and checkpoints take them."""

import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dmjd.encoders.parts import Part
from dmjd.engine.processes import from_first
from dmjd.engine.sharding import WholeModel, divided_like
from dmjd.runs.checkpoint import Checkpoint, load_optimizer_tensors, named_tensors, optimizer_tensors
from dmjd.runs.parts import check_parts, write_parts


class Weights:
    """Weights and optimizer state of a training, which are whole in this process or put together when needed.

    Args:
        model: the model that is trained.
        optimizer: its optimizer.
        whole: the whole of the model, if that is sharded.
        in_parts: whether each process writes its part of a checkpoint, if the model is sharded.

    Attributes:
        in_parts: whether each process writes its part of a checkpoint; otherwise the first one writes all.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, whole: WholeModel | None, in_parts: bool = False
    ) -> None:
        self._model, self._optimizer, self._whole = model, optimizer, whole
        self.in_parts = in_parts and whole is not None

    @property
    def need_all_processes(self) -> bool:
        """Whether :meth:`gather` has something to do, and so needs all processes at the same step."""
        return self._whole is not None

    def load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint, in one file or in parts, unless it holds no optimizer state, only a result.

        Raises:
            RuntimeError, KeyError: if it does not fit.
        """
        optimizer = checkpoint.part("optimizer")
        if not optimizer:
            return
        saved = checkpoint.part("model")
        own = self._model.state_dict() if self._whole is not None else {}
        # Of a sharded model one tensor after the other: that all are whole is what there may be no memory for.
        self._model.load_state_dict({key: divided_like(saved[key], own.get(key)) for key in saved})
        load_optimizer_tensors(self._optimizer, optimizer)

    def gather(self, with_optimizer: bool = True) -> None:
        """Put a sharded model together in the first process; the optimizer too, unless checkpoints are in parts."""
        if self._whole is not None:
            state = with_optimizer and not self.in_parts
            self._whole.gather(optimizer_tensors(self._optimizer) if state else None)

    def release(self) -> None:
        """Free what :meth:`gather` put together."""
        if self._whole is not None:
            self._whole.release()

    def save(self, file: Path, write: Callable[[dict[str, Tensor], list[Part]], None]) -> None:
        """Save a checkpoint; after :meth:`gather`. One in parts is saved by all processes, others by the first one.

        Args:
            file: its file; the first process's counts.
            write: writes that file, given the tensors in it and the parts that were written. Called in the first
                process.

        Raises:
            ValueError: if it could not be written; of one in parts, in all processes.
        """
        if not self.in_parts:
            whole = self._whole
            optimizer = optimizer_tensors(self._optimizer) if whole is None else whole.optimizer
            write(_named(self._model if whole is None else whole.model, optimizer), [])
            return
        # Names that are new: the parts of a checkpoint that is saved again stay until its file is replaced.
        name = from_first(lambda: f"{file.stem}.{secrets.token_hex(4)}")
        parts = write_parts(file.parent, name, _named(self._model, optimizer_tensors(self._optimizer)))

        def commit() -> None:
            check_parts(file.parent, parts)
            write({}, parts)

        from_first(commit)


def _named(model: nn.Module, optimizer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in it."""
    return named_tensors("model", model) | {f"optimizer.{key}": value for key, value in optimizer.items()}
