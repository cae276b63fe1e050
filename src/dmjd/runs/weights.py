"""The weights of a training, and the state of its optimizer, as evaluations and checkpoints take them."""

import torch
from torch import Tensor, nn

from dmjd.engine.sharding import WholeModel
from dmjd.runs.checkpoint import named_tensors, optimizer_tensors


class Weights:
    """Weights and optimizer state of a training, which are whole in this process or put together when needed.

    Args:
        model: the model that is trained.
        optimizer: its optimizer.
        whole: the whole of the model, if that is sharded.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, whole: WholeModel | None) -> None:
        self._model, self._optimizer, self._whole = model, optimizer, whole

    @property
    def need_all_processes(self) -> bool:
        """Whether :meth:`gather` has something to do, and so needs all processes at the same step."""
        return self._whole is not None

    def gather(self, with_optimizer: bool = True) -> None:
        """Put a sharded model together in the first process."""
        if self._whole is not None:
            self._whole.gather(optimizer_tensors(self._optimizer) if with_optimizer else None)

    def release(self) -> None:
        """Free what :meth:`gather` put together."""
        if self._whole is not None:
            self._whole.release()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, in the first process; after :meth:`gather`."""
        if self._whole is None:
            model, optimizer = self._model, optimizer_tensors(self._optimizer)
        else:
            model, optimizer = self._whole.model, self._whole.optimizer
        return named_tensors("model", model) | {f"optimizer.{key}": value for key, value in optimizer.items()}
