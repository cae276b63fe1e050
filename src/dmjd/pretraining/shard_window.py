"""The shards whose images a run shuffles together, where a cache does not hold all of them."""

import warnings
from pathlib import Path

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.data.sources.remote import is_url
from dmjd.pretraining.batch_size import keep_batch_size
from dmjd.pretraining.held_out import keep_held_out
from dmjd.runs.checkpoint import read_config_of


def keep_recorded(config: PretrainConfig, out: Path) -> PretrainConfig:
    """The configuration with what the run in a folder, if there is one, began with and the configuration leaves open:
    batch size, number of held-out images, shards per window.
    """
    return keep_shard_window(keep_held_out(keep_batch_size(config, out), out), out)


def keep_shard_window(config: PretrainConfig, out: Path) -> PretrainConfig:
    """The configuration with the shards per window that the run in a folder, if there is one, began with; 0: all."""
    if config.shard_window is not None:
        return config
    with warnings.catch_warnings(action="ignore"):  # they are shown later, under the lock of the folder
        old = read_config_of(out)
    return config if old is None else config.replace(shard_window=old.shard_window or 0)


def record_window(config: PretrainConfig, source: Source) -> PretrainConfig:
    """The configuration with the shards per window of a set; None for one that has no windows.

    Raises:
        ValueError: if windows are wanted, or the run began with some, and the set has none.
    """
    if source.windows is not None:
        return config.replace(shard_window=source.windows.size)
    if config.shard_window:
        remote = isinstance(config.data, str) and is_url(config.data)
        cure = "give the size of the cache" if remote else "give the address of the shards, or leave --shard-window out"
        raise ValueError(
            f"images are shuffled by windows of {config.shard_window} shards (--shard-window, or as the run began), "
            f"which needs remote shards and --cache-gb: {cure}"
        )
    return config.replace(shard_window=None)
