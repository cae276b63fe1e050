"""Scalars to TensorBoard and Weights & Biases."""

from pathlib import Path
from typing import Any, Protocol


class TensorBoardLogger:
    """Scalars as TensorBoard events.

    Args:
        folder: where the event file goes. step: events after it, of an interrupted run, are hidden.
    """

    def __init__(self, folder: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Write scalars of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbLogger:
    """Scalars to Weights & Biases, one run for one folder.

    Args:
        name: of the run. config: shown with it.

    Raises:
        ValueError: when the extra is not installed.
    """

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs Weights & Biases: pip install 'dmjd[wandb]'") from None
        self._run = wandb.init(project="dmjd", name=name, id=name, resume="allow", config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send scalars of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Logger(Protocol):
    """Where scalars go besides ``metrics.jsonl``."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take scalars of a step."""

    def close(self) -> None:
        """Write what is left."""


def open_loggers(folder: Path, step: int, wandb_config: dict[str, Any] | None) -> list[Logger]:
    """TensorBoard events in the run folder and, where a configuration is given, Weights & Biases."""
    loggers: list[Logger] = [TensorBoardLogger(str(folder), step)]
    if wandb_config is not None:
        loggers.append(WandbLogger(folder.name, wandb_config))
    return loggers
