"""Settings of the cache for remote files. Imports no torch."""

from typing import Any

from dmjd.config.checks import MAX_COUNT, MAX_FACTOR
from dmjd.config.fields import option


def cache_dir_option(group: str) -> Any:
    """The folder."""
    return option(
        None, "folder for copies of remote files; default $XDG_CACHE_HOME/dmjd, or ~/.cache/dmjd", group, resume=True
    )


def cache_gb_option(group: str) -> Any:
    """The size of the cache of remote shards."""
    return option(
        None,
        "size in GB of the cache of remote shards, fetched while they are needed; default: all are fetched first",
        group,
        resume=True,
        gt=0,
        most=MAX_FACTOR,
    )


def shard_window_option(group: str) -> Any:
    """The shards whose images are shuffled together."""
    return option(
        None,
        "shards whose images are shuffled together; default half of those that --cache-gb holds, 0 (all) if all fit",
        group,
        ge=0,
        most=MAX_COUNT,
    )
