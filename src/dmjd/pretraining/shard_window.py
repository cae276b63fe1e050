"""What a run decided when it began: kept when it is resumed. The shards whose images it shuffles together."""

import warnings
from pathlib import Path

from dmjd.config.pretrain import FORMER_BATCH_SIZE, PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.runs.checkpoint import read_config_of
from dmjd.text import printable


def keep_recorded(config: PretrainConfig, out: Path) -> PretrainConfig:
    """The configuration with what the run in a folder, if there is one, began with and the configuration leaves open:
    batch size, base learning rate, number of held-out images, shards per window.
    """
    with warnings.catch_warnings(action="ignore"):  # they are shown later, under the lock of the folder
        old = read_config_of(out)
    if old is None:
        return config
    recorded = {
        "batch_size": old.batch_size or FORMER_BATCH_SIZE,
        "blr": old.blr,
        "held_out": old.held_out or 0,
        "shard_window": old.shard_window or 0,  # 0: all
    }
    return config.replace(**{name: value for name, value in recorded.items() if getattr(config, name) is None})


def record_window(config: PretrainConfig, source: Source) -> PretrainConfig:
    """The configuration with the shards per window of a set; None for one that has no windows.

    Raises:
        ValueError: if windows are wanted, or the run began with some, and the set has none.
    """
    if source.windows is not None:
        return config.replace(shard_window=source.windows.size)
    if config.shard_window:
        raise ValueError(
            f"images are shuffled by windows of {config.shard_window} shards (--shard-window, or as the run began), "
            f"which needs shards; {printable(source.name)} is {source.kind}: leave --shard-window out"
        )
    return config.replace(shard_window=None)
