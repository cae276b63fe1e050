"""What differs between trainings, besides the loop: the part that the driver of every training calls."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dmjd.engine.loggers import Logger
from dmjd.engine.loop import Report
from dmjd.runs.checkpoint import Checkpoint


class Callback:
    """The part that differs between trainings. All methods are optional.

    ``restore``, ``is_due`` and ``share`` run in every process, the others in the first one.

    Attributes:
        divisible: whether a step has ``engine.accumulate`` micro-batches, so that it can be divided further if the
            first steps do not fit into the device's memory.
    """

    divisible: ClassVar[bool] = False

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore what :meth:`state` and :meth:`tensors` saved; ValueError if the checkpoint belongs to other data."""

    def after_restore(self) -> None:
        """Called in the first process when everything is restored: write what is missing or stale."""

    def start(self, step: int, progress: float) -> Sequence[Logger]:
        """Called before the first step. Returns destinations of scalars besides ``metrics.jsonl``."""
        return ()

    def after_step(self, report: Report) -> None:
        """Called after every step, before evaluation."""

    def is_due(self, report: Report) -> bool:
        """Whether to evaluate after this step. Depends on the report alone: every process calls it."""
        return False

    def share(self) -> None:
        """Called in all processes at the same steps, those of logs and checkpoints: exchange what only one knows."""

    def evaluate(self, report: Report) -> dict[str, float]:
        """Evaluate the model. Returns scalars to log."""
        return {}

    def state(self) -> dict[str, Any]:
        """Additional state for a checkpoint, as JSON types."""
        return {}

    def tensors(self, tensors: dict[str, Tensor], final: bool) -> dict[str, Tensor]:
        """The tensors of a checkpoint, given those of model and optimizer."""
        return tensors

    def after_save(self, final: bool) -> None:
        """Called after a checkpoint was written."""
