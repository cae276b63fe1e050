"""The settings of a run: completed, compared with those of the run that is resumed, and recorded."""

import warnings
from pathlib import Path

from lightning.fabric import Fabric

from dmjd.config.pretrain import PretrainConfig
from dmjd.config.strategies import DDP, FSDP
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import absolute, absolute_sources
from dmjd.encoders.timm_weights import LOCAL
from dmjd.engine.console import Console
from dmjd.engine.loggers import import_wandb
from dmjd.engine.sharding import is_sharded
from dmjd.runs.branches import abandoned_cooldown, leave_cooldown
from dmjd.runs.build import LISTING
from dmjd.runs.checkpoint import RunFolder, check_continues
from dmjd.runs.start import Start


def resolve_paths(config: PretrainConfig) -> PretrainConfig:
    """The configuration with absolute paths, so that the run can be resumed from any directory.

    Raises:
        ValueError: if ``data`` or ``out`` is missing.
    """
    if config.data is None:
        raise ValueError("say what to train on: --data FOLDER (or a .parquet file, a set name, digits)")
    if config.out is None:
        raise ValueError("say where the run goes: --out DIR")
    paths = {name: getattr(config, name) for name in ("test_data", "root", "cache_dir", "teacher", "init")}
    texts = paths | {"data": config.data if isinstance(config.data, str) else None}
    if empty := [name for name, path in texts.items() if path is not None and not path.strip()]:
        raise ValueError(f"--{empty[0].replace('_', '-')} is empty: give a path or a name")
    paths = {name: _absolute(path) for name, path in paths.items() if path is not None}
    return config.replace(data=absolute_sources(config.data), **paths)


def _absolute(path: str) -> str:
    """A path made absolute, also behind timm's ``local-dir:``; names stay as they are."""
    prefix = LOCAL if path.startswith(LOCAL) else ""
    return prefix + absolute(path.removeprefix(prefix))


def check_settings(config: PretrainConfig, out: Path, fabric: Fabric, own_model: bool) -> None:
    """Check in the first process that the settings continue the run in a folder, before a large set is listed.

    They are checked again under the lock of the folder, with the warnings.

    Raises:
        ValueError: if they do not, in the first process; or in all, if the caller's own model was to be sharded.
    """
    if own_model and is_sharded(fabric):
        raise ValueError(f"strategy {FSDP} divides a model of its own: leave model out, or use strategy {DDP}")
    if config.wandb:
        import_wandb()
    if fabric.is_global_zero:
        with warnings.catch_warnings(action="ignore"):
            check_continues(out, config)


def record_settings(
    folder: RunFolder, config: PretrainConfig, source: Source, start: Start | None, console: Console
) -> None:
    """Write in the first process what the run begins with; a run that is prolonged leaves its cooldown."""
    if not folder.owner:
        return
    if (stable := abandoned_cooldown(folder.path, config)) is not None:
        leave_cooldown(folder.path, stable, console.say)
    folder.validate_config(config)
    source.save_listing(folder.path / LISTING)
    if start is not None:
        start.save(folder.path)
