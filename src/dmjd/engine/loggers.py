"""Loggers of scalars: TensorBoard and Weights & Biases."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dmjd.text import file_name, printable

T = TypeVar("T")


class Logger(Protocol):
    """A destination of scalars besides ``metrics.jsonl``. ``close`` must not raise; see :class:`GuardedLogger`."""

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

        self._hook = threading.excepthook
        threading.excepthook = self._except
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the scalars of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _except(self, thread: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of the thread that writes events: its error is raised by :meth:`log` or ``close``."""
        if not type(thread.thread).__module__.startswith("tensorboard."):
            self._hook(thread)


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


class GuardedLogger:
    """A logger that is given up, with one warning, if it fails, e.g. on a full disk: the training goes on.

    Args:
        name: its name in the warning.
        open_logger: opens the logger.
        warn: prints a warning.
    """

    def __init__(self, name: str, open_logger: Callable[[], Logger], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._logger: Logger | None = None
        self._logger = self._attempt(open_logger)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the scalars of a step, unless the logger failed before."""
        if (logger := self._logger) is not None:
            self._attempt(lambda: logger.log(values, step))

    def close(self) -> None:
        """Flush and close. Never raises, so that the cause of a failing training is not masked."""
        if (logger := self._logger) is not None:
            self._attempt(logger.close)
            self._logger = None

    def _attempt(self, action: Callable[[], T]) -> T | None:
        """Run an action of the logger; if it fails, warn and give the logger up."""
        try:
            return action()
        except Exception as error:  # whatever another library raises must not end the training
            failed, self._logger = self._logger, None
            self._warn(f"{self._name} failed and is closed; metrics.jsonl holds all scalars: {error}")
            if failed is not None:
                with contextlib.suppress(Exception):
                    failed.close()
            return None


def open_loggers(
    folder: Path, step: int, wandb_config: dict[str, Any] | None, warn: Callable[[str], None]
) -> list[Logger]:
    """TensorBoard in the run folder and, if a configuration is given, Weights & Biases.

    Args:
        folder: the run folder.
        step: the training continues after this step.
        wandb_config: configuration for Weights & Biases; None: it is not used.
        warn: prints a warning, once for a logger that fails later.
    """
    loggers: list[Logger] = [GuardedLogger("TensorBoard", lambda: TensorBoardLogger(str(folder), step), warn)]
    if wandb_config is not None:
        wandb = WandbLogger(folder.name, wandb_config)  # a missing key or network is an error at the start
        loggers.append(GuardedLogger("Weights & Biases", lambda: wandb, warn))
    return loggers
