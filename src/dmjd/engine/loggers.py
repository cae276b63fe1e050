"""Loggers of scalars: TensorBoard and Weights & Biases."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dmjd.text import file_name, printable


class Logger(Protocol):
    """A destination of scalars besides ``metrics.jsonl``."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the scalars of a step."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoardLogger:
    """Scalars as TensorBoard events.

    Args:
        folder: folder of the event file.
        step: events after this step, left by an interrupted run, are hidden.
    """

    def __init__(self, folder: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the scalars of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def import_wandb() -> Any:
    """The package of Weights & Biases, ready to log.

    Raises:
        ValueError: if the extra is not installed, or there is no valid key; ``WANDB_MODE=offline`` needs none.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs Weights & Biases: pip install 'dmjd[wandb]'") from None
    with _explained(wandb):
        offline = wandb.setup().settings.mode in ("offline", "disabled", "dryrun")
        # Without a terminal there is nobody to ask; former versions cannot do without, and fail when the run begins.
        if not offline and "prompt" in inspect.signature(wandb.login).parameters and not wandb.login(prompt=False):
            raise ValueError("--wandb needs a key: run 'wandb login', set WANDB_API_KEY, or use WANDB_MODE=offline")
    return wandb


@contextlib.contextmanager
def _explained(wandb: Any) -> Iterator[None]:
    """Raise errors of Weights & Biases as ValueError."""
    try:
        yield
    except wandb.Error as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"--wandb: {reason}; leave it out, run 'wandb login', or use WANDB_MODE=offline") from None


class WandbLogger:
    """Scalars to Weights & Biases, as one run per run folder.

    Args:
        name: name and id of the run.
        config: settings stored with the run.

    Raises:
        ValueError: if the extra is not installed, or Weights & Biases refuses.
    """

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        wandb = import_wandb()
        with _explained(wandb):
            # An id may not hold characters such as / and #.
            self._run = wandb.init(
                project="dmjd", name=printable(name), id=file_name(name), resume="allow", config=config
            )

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the scalars of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_loggers(folder: Path, step: int, wandb_config: dict[str, Any] | None) -> list[Logger]:
    """TensorBoard in the run folder and, if a configuration is given, Weights & Biases."""
    loggers: list[Logger] = [TensorBoardLogger(str(folder), step)]
    if wandb_config is not None:
        loggers.append(WandbLogger(folder.name, wandb_config))
    return loggers
