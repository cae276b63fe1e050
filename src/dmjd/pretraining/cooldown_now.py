"""``cooldown_now``: a finished encoder of a run as it is, by its process if it is under way."""

import os
from contextlib import closing
from pathlib import Path

from dmjd.config.checks import check_out
from dmjd.config.pretrain import PretrainConfig
from dmjd.engine.console import Console
from dmjd.engine.cooldown_signal import SIGNAL
from dmjd.engine.device import make_fabric
from dmjd.engine.processes import find_launch, from_first
from dmjd.files import try_lock
from dmjd.pretraining.settings import resolve_paths
from dmjd.pretraining.shard_window import keep_recorded
from dmjd.runs.branches import BRANCHES, check_branches, start_branch
from dmjd.runs.checkpoint import RunFolder, check_continues
from dmjd.runs.owner import LOCK, Owner
from dmjd.runs.start import read_start


def branch_to_train(config: PretrainConfig, has_model: bool) -> PretrainConfig | None:
    """The branch that a call with ``cooldown_now`` is to train; None if a run under way was asked to make one.

    Args:
        config: its ``out`` names the run; if ``data`` is given too, all settings must be those of the run.
        has_model: whether the caller gives a model.

    Raises:
        ValueError: if there is no such run, or it can have no branch.
    """
    if config.out is None:
        raise ValueError("--cooldown-now: say where the run is: --out DIR")
    out = check_out("out", config.out)
    own = check_branches(out)
    if config.data is not None:
        kept = keep_recorded(resolve_paths(config), out)
        own, _ = read_start(kept, out, own_model=has_model)
        check_continues(out, own)
    if find_launch().num_processes > 1:
        make_fabric(own.device, own.precision)  # connects the processes
    return from_first(lambda: _ask_or_start(out, own))


def _ask_or_start(out: Path, config: PretrainConfig) -> PretrainConfig | None:
    """Ask the process that trains in a run folder for a branch; if there is none, prepare a branch and return it."""
    if (owner := _ask_owner(out)) is not None:
        when = "its current step" if owner.processes == 1 else "the next step that is logged (--log-every)"
        Console().say(
            f"asked process {owner.pid}, which trains in {out}: after {when} it makes a finished encoder in "
            f"{out / BRANCHES}, and goes on. Its output says more"
        )
        return None
    with closing(RunFolder(out)):
        return start_branch(out, config)


def _ask_owner(run: Path) -> Owner | None:
    """Send the signal to the process that trains in a run folder.

    Returns:
        The process; None if there is none.

    Raises:
        ValueError: if there is one that cannot be asked.
    """
    owner = _owner_of(run)
    if owner is None or owner.is_dead():
        return None
    named = f"process {owner.pid} on {owner.machine}, which trains in {run},"
    if owner.processes is None:
        raise ValueError(f"{named} is of a version without --cooldown-now: stop it, and give the command again")
    if not owner.is_here():
        raise ValueError(f"{named} can only be asked there: give the command on that machine")
    if SIGNAL is None:
        raise ValueError(f"{named} cannot be asked on this system, which has no SIGUSR1: stop it first")
    try:
        os.kill(owner.pid, SIGNAL)
    except ProcessLookupError:
        return None
    except PermissionError:
        raise ValueError(f"{named} belongs to another user") from None
    return owner


def _owner_of(run: Path) -> Owner | None:
    """The process that holds the lock of a run folder."""
    try:
        if (lock := try_lock(run / LOCK)) is None:
            return Owner.read(run / LOCK)
    except OSError as error:
        raise ValueError(f"--out {run} cannot be written: {error.strerror}") from None
    lock.close()
    return None
