"""Branches of a run with the schedule wsd: run folders of their own, in ``RUN/branches``.

``branches/step-N`` goes on from step N of the run with a cooldown. There are two ways to it: a run that is prolonged
leaves the cooldown that it had, and ``cooldown_now`` makes one that it did not have.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmjd.checked_json import check_json
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import length_of
from dmjd.config.schedules import DEFAULT_COOLDOWN, DEFAULT_WARMUP_STEPS, WSD
from dmjd.encoders.headers import (
    CHECKPOINTS,
    COOLING_KEY,
    FINAL,
    STABLE,
    WEIGHTS_KEY,
    Header,
    read_header,
    read_headers,
    step_files,
)
from dmjd.encoders.parts import PARTS, parts_of
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.files import copy_file, make_folder, move, remove, write_text
from dmjd.result_files import BASELINES, EVALUATION, REPORT_FILE, read_evaluation
from dmjd.runs.checkpoint import CONFIG_FILE, Checkpoint, PretrainState, load_checkpoint, read_config_of
from dmjd.runs.owner import LOCK
from dmjd.runs.parts import remove_unused_parts

BRANCHES = "branches"

FIGURES = "figures"

FEWEST_STEPS = 10  # of the cooldown of a branch

_APPENDED = ".jsonl"  # ending of files that are not replaced when they change


def abandoned_cooldown(run: Path, config: PretrainConfig) -> Checkpoint | None:
    """The state before the cooldown of a run, if the cooldown has begun and a configuration prolongs the run.

    Raises:
        ValueError: if the run would be prolonged, but that state is missing or damaged.
    """
    headers, _ = read_headers(run / CHECKPOINTS)
    if not headers or not headers[0].metadata.get(COOLING_KEY):
        return None
    before, after = length_of(_config_of(headers[0])), length_of(config)
    if before == after:
        return None
    try:
        stable = load_checkpoint(run / CHECKPOINTS / STABLE)
        check_json(stable.state, PretrainState, str(stable.path))
    except ValueError as error:
        reason = str(error) if (run / CHECKPOINTS / STABLE).exists() else "it is missing, as in a branch"
        raise ValueError(
            f"{run} cannot be prolonged: that needs its state before the cooldown ({reason}). Give --{before[0]} "
            f"{before[1]:g} as before, or another --out"
        ) from None
    return stable


def leave_cooldown(run: Path, stable: Checkpoint, say: Callable[[str], None]) -> None:
    """Make a branch of the cooldown of a run, and take the run back to its state before.

    The branch is complete before anything is deleted, so that a kill at any time loses nothing.

    Args:
        run: the run folder, which is locked.
        stable: the state before the cooldown.
        say: prints a message.
    """
    headers, _ = read_headers(run / CHECKPOINTS)
    newest, step = headers[0], int(stable.state["progress"]["step"])
    cooled = [file for file in step_files(run / CHECKPOINTS) if file.name > f"step-{step:09d}.safetensors"]
    cooled += [file for file in (run / CHECKPOINTS / FINAL,) if file.exists()]
    digest = newest.metadata.get(WEIGHTS_KEY)
    branch = next(path for path in _folders(run, step) if not path.exists() or _newest_weights(path) == digest)
    if not branch.exists():
        with _Making(branch) as made:
            _copy_tree(run, made, lambda path: path.parts[0] not in (BRANCHES, CHECKPOINTS))
            for file in [newest.path] if newest.path.name == FINAL else cooled:
                _link_checkpoint(file, made)
            write_text(made / CONFIG_FILE, _config_of(newest).replace(out=str(branch)).to_json())
    for file in (run / EVALUATION).glob("*.json"):
        with suppress(ValueError, OSError):
            if file.name != BASELINES and read_evaluation(file).get("encoder") == digest:
                remove(file)
    figures = (run / FIGURES).glob("step-*.png")
    for file in (*figures, run / FIGURES / "final.png", run / FIGURES / "curves.png"):
        if not file.stem.startswith("step-") or file.name > f"step-{step:09d}.png":
            remove(file)
    for file in sorted(cooled, key=lambda file: file == newest.path):  # the newest last: it says what is to be done
        remove(file)
    remove_unused_parts(run / CHECKPOINTS)
    say(f"the run is prolonged from step {step}, before its cooldown; the encoder it had so far is in {branch}")


def start_branch(run: Path, config: PretrainConfig) -> PretrainConfig:
    """Prepare a branch with a cooldown from the newest checkpoint of a run; one that was begun is taken up again.

    Args:
        run: the run folder, which is locked.
        config: its configuration.

    Returns:
        The configuration of the branch, to be trained.

    Raises:
        ValueError: if there is no checkpoint, it belongs to the warm-up, or the run's own cooldown has begun.
    """
    headers, unreadable = read_headers(run / CHECKPOINTS)
    if not headers:
        reasons = "".join(f"; {one.reason}" for one in unreadable[:1])
        raise ValueError(f"{run} has no checkpoint yet that a cooldown could begin from{reasons}")
    newest, warmup = headers[0], config.warmup_steps if config.warmup_steps is not None else DEFAULT_WARMUP_STEPS
    if newest.path.name == FINAL:
        raise ValueError(f"{run} is finished: {run / ENCODER_FILE} is its encoder")
    is_next = newest.path.name == STABLE and length_of(_config_of(newest)) == length_of(config)
    if is_next or newest.metadata.get(COOLING_KEY):
        raise ValueError(f"{run} is in its own cooldown; the same command without --cooldown-now finishes it")
    if newest.step <= warmup:
        raise ValueError(f"{run}: its newest checkpoint, of step {newest.step}, belongs to the {warmup} warm-up steps")
    branch = next(_folders(run, newest.step))
    if (begun := read_config_of(branch)) is not None:
        return begun.replace(out=str(branch), data=config.data)
    steps = max(FEWEST_STEPS, round((config.cooldown or DEFAULT_COOLDOWN) * newest.step))
    branched = config.replace(
        out=str(branch),
        steps=newest.step + steps,
        cooldown=steps / (newest.step + steps),
        wandb=False,  # which follows one run of a process
        resume=True,
        cooldown_now=False,
    )
    with _Making(branch) as made:
        kept = Path(EVALUATION, BASELINES)
        _copy_tree(run, made, lambda path: path == kept or (len(path.parts) == 1 and path.name != REPORT_FILE))
        _link_checkpoint(newest.path, made)
        write_text(made / CONFIG_FILE, branched.to_json())
    return branched


def check_branches(run: Path) -> PretrainConfig:
    """The configuration of a run that can have branches.

    Raises:
        ValueError: if there is no run in the folder, or it has another schedule.
    """
    config = read_config_of(run)
    if config is None:
        raise ValueError(f"--cooldown-now: {run} holds no run; give its folder as --out")
    if config.schedule != WSD:
        raise ValueError(
            f"--cooldown-now needs a run with --schedule {WSD}: {run} has {config.schedule}, whose learning rate "
            "follows its length"
        )
    return config


def tidy_branch(branch: Path) -> None:
    """Delete the checkpoints of a finished branch besides the final one."""
    for file in step_files(branch / CHECKPOINTS):
        remove(file)
    remove_unused_parts(branch / CHECKPOINTS)


def _folders(run: Path, step: int) -> Iterator[Path]:
    """Folders for a branch: the usual one, then others."""
    first = run / BRANCHES / f"step-{step}"
    return itertools.chain([first], (first.with_name(f"{first.name}-{n}") for n in itertools.count(2)))


def _config_of(header: Header) -> PretrainConfig:
    return PretrainConfig.from_json(json.dumps(header.metadata.get("config")), str(header.path))


def _newest_weights(run: Path) -> Any:
    headers, _ = read_headers(run / CHECKPOINTS)
    return headers[0].metadata.get(WEIGHTS_KEY) if headers else None


class _Making:
    """Context in which a folder is filled under another name, and gets its own if all went well."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._partial = folder, folder.with_name(f".{folder.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)  # that a kill left
        make_folder(self._partial / CHECKPOINTS)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            move(self._partial, self._folder)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def _copy_tree(run: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy the files of a run whose paths in it are wanted, besides its lock and the logs of TensorBoard."""
    for folder, folders, names in os.walk(run):
        inside = Path(folder).relative_to(run)
        folders[:] = [name for name in folders if name not in (BRANCHES, CHECKPOINTS) or inside.parts]
        for name in names:
            path = inside / name
            if wanted(path) and name != LOCK and not name.startswith(("events.out.", ".")):
                _link(run / path, target / path)


def _link_checkpoint(file: Path, run: Path) -> None:
    """:func:`_link` for a checkpoint and its parts, to another run."""
    _link(file, run / CHECKPOINTS / file.name)
    for part in parts_of(file, read_header(file).metadata):
        _link(file.parent / PARTS / part["file"], run / CHECKPOINTS / PARTS / part["file"])


def _link(file: Path, target: Path) -> None:
    """Make a second name for a file, which costs no space; a copy where that is impossible, or the file may grow."""
    make_folder(target.parent)
    if file.suffix != _APPENDED:
        with suppress(OSError):
            os.link(file, target)
            return
    copy_file(file, target)
