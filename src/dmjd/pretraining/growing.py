"""The images that join a run's set while it trains (``--data-may-grow``)."""

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.growth import GROWTH_FILE, Growth
from dmjd.data.sources.base import Source
from dmjd.engine.console import Console
from dmjd.engine.processes import from_first
from dmjd.files import remove
from dmjd.runs.checkpoint import Checkpoint, RunFolder


def open_growth(
    config: PretrainConfig,
    source: Source,
    trained: Source,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    console: Console,
) -> Growth | None:
    """The images that have joined the set of a run, and that will join it; None if none did and none may.

    A run that is resumed without ``data_may_grow`` keeps those that have joined.

    Args:
        config: of the run.
        source: the images that it began with.
        trained: those of them that it trains on.
        folder: the run folder, locked.
        checkpoint: that the run goes on from; without one it begins with the images that are there now.
        console: for messages.

    Raises:
        ValueError: if the record is damaged, or lacks images that the checkpoint was trained on.
    """
    file = folder.path / GROWTH_FILE
    if checkpoint is None and folder.owner:
        remove(file)
    if not config.data_may_grow and not from_first(file.exists):
        check_joined(None, checkpoint, folder)
        return None
    growth = Growth(
        source,
        [part.length for part in trained.parts] or [len(trained)],
        config.seed,
        file,
        looking=config.data_may_grow,
        from_first=from_first,
        say=console.say,
        warn=console.warn,
    )
    check_joined(growth, checkpoint, folder)
    return growth


def check_joined(growth: Growth | None, checkpoint: Checkpoint | None, folder: RunFolder) -> None:
    """Raise ValueError if the record lacks images that had joined when the checkpoint was written."""
    joined = checkpoint.state.get("joined", 0) if checkpoint is not None else 0
    known = growth.count if growth is not None else 0
    if known < joined:
        raise ValueError(
            f"{folder.path / GROWTH_FILE} is missing or cut short: {joined} images had joined the set when "
            f"{checkpoint.path if checkpoint is not None else ''} was written, and it names {known}. Put it back, or "
            "give another --out"
        )
