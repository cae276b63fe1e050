"""What may change when a run is resumed. Imports no torch."""

import dataclasses

from dmjd.config.pretrain import DURATIONS, FORMER_BATCH_SIZE, PretrainConfig
from dmjd.config.sources import moved_sources
from dmjd.config.tokens import default_block, default_cell, patch_of


def length_of(config: PretrainConfig) -> tuple[str, float]:
    """The unit of the length of a run, and the length."""
    return next((name, value) for name in DURATIONS if (value := getattr(config, name)) is not None)


def _length_differences(old: PretrainConfig, new: PretrainConfig) -> list[str]:
    """A line that says how to go on, if a run would become shorter or change the unit that its schedule counts in."""
    (unit, before), (now, after) = length_of(old), length_of(new)
    if unit == now and after >= before:
        return []
    flag = f"--{unit} {_number(before)}"
    return [f"length: {flag} -> --{now} {_number(after)} (go on with {flag}, or more {unit} for a longer run)"]


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _spelled_out(config: PretrainConfig, name: str) -> object:
    """The value of a setting; of one that is not given what it stands for, if the encoder's name says its patch."""
    value, patch = getattr(config, name), patch_of(config.encoder)
    if value is not None or not patch:
        return value
    if name == "hog_cell":
        return default_cell(patch)
    return default_block((config.size[0] // patch, config.size[1] // patch))


def resume_differences(old: PretrainConfig, new: PretrainConfig) -> list[str]:
    """Settings that differ although a resumed run must keep them, as "name: old -> new".

    Fields marked ``resume`` may change: workers, device, logging, intervals, unreadable images, labels, test data, and
    the path of the images, if they are the same; of a mixture not the number, order and weights of its sources. A
    duration may become longer, in the same unit. Complementary masks are disjoint masks of a certain ratio, and are
    drawn the same, so that each may replace the other.
    """
    lines = _length_differences(old, new)
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name == "batch_size":
            before = before or FORMER_BATCH_SIZE
        if field.name in ("batch_size", "blr"):
            after = after or before  # a run keeps the one it began with
        if field.name in ("held_out", "shard_window"):
            before = before or 0
            after = before if after is None else after
        if before == after or field.name in DURATIONS:
            continue
        if field.name in ("block_size", "hog_cell") and _spelled_out(old, field.name) == _spelled_out(new, field.name):
            continue
        if field.name == "masks" and {before, after} == {"disjoint", "complementary"}:
            continue
        if field.name == "data" and None not in (before, after):
            lines += [f"data: {words}"] if (words := moved_sources(before, after)) is not None else []
        elif not field.metadata["resume"]:
            lines.append(f"{field.name}: {before} -> {after}")
    return lines
