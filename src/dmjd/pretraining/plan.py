"""``plan(data=..., hours=...)``: what to run on a set of images in a given time on this machine, and what to expect."""

import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import torch
from rich.table import Column, Table

from dmjd.config.plan import PlanConfig
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.recipes import get_recipe
from dmjd.config.sources import data_text, stored_data
from dmjd.data.overview import Overview, overview
from dmjd.data.sources.base import Source
from dmjd.data.statistics import range_warning
from dmjd.engine.busy_cores import warn_of_busy_cores
from dmjd.engine.console import Console, literal
from dmjd.engine.device import machine, make_fabric
from dmjd.nn.modes import own_defaults
from dmjd.pretraining.plan_choices import (
    ENCODERS,
    GIVEN,
    LISTED,
    LOW,
    SHARE,
    Choices,
    Reach,
    choose_batch,
    choose_model,
    choose_parts,
    choose_start,
    choose_views,
    data_warnings,
    length_warnings,
    more_views,
    time_warnings,
)
from dmjd.pretraining.plan_measures import Measured, measure
from dmjd.runs.build import build_model, open_data
from dmjd.runs.checkpoint import KEEP
from dmjd.runs.start import begin_from

LOOK_SECONDS, PROBE_SECONDS, MEASURE_SECONDS = 10.0, 6.0, 15.0  # of the parts of a plan, at most, besides a step

START_SECONDS = 8.0  # of a run until its images are read: imports, opening the set

_FIGURES = 20 << 20  # bytes of the figures and logs of a run, about


@own_defaults()
def plan(**settings: Any) -> dict[str, Any]:
    """Plan a run: look at the images, measure this machine with real steps, and choose what to run.

    Takes about a minute. Nothing stays on the disk.

    Args:
        settings: see :class:`~dmjd.config.plan.PlanConfig`: ``data`` and ``hours``, and what is already decided.

    Returns:
        "data", the set; "choices", setting -> why; "command"; "expected": "images_per_s", "seconds_per_step", "steps",
        "epochs", "training_minutes", "reading_minutes" of a set that is held in memory, "minutes" in all, "memory_gb"
        (of the process; on a GPU of its tensors), "disk_gb"; "warnings"; "machine".

    Raises:
        ValueError: if the images or the settings cannot be used.
    """
    asked, console = PlanConfig(**settings), Console()
    asked.check_complete()
    choices = choose_start(asked)
    base, _ = begin_from(choices.config(asked))  # the weights of --init may decide how the images are read
    fabric = make_fabric(base.device, "auto")
    assert asked.data is not None
    source = open_data(base, asked.data, "train")
    with closing(console):
        console.wait("looking at the images ...")
        seen = overview(source, LOOK_SECONDS)
        warn_of_busy_cores(fabric.device, console)
        console.wait("measuring this machine ...")
        budget = 3600 * SHARE * (asked.hours or 0)
        reach = _choose_precision(choices, asked, source, fabric.device, budget)
        choose_model(choices, asked, seen, reach)
        first = _expected_images(choices, asked, reach)
        choose_batch(choices, asked, seen, first, fabric.device.type == "cpu")
        console.wait("measuring the run of the plan ...")
        measured = measure(choices.config(asked), source, MEASURE_SECONDS, budget)
        images = measured.images_per_s * _training_seconds(measured, asked.hours or 0)
        if images < 0.8 * first:  # slower than the first measurement said
            choose_batch(choices, asked, seen, images, fabric.device.type == "cpu")
            if choices.settings.get("batch_size", measured.batch_size) < measured.batch_size:
                # Part of a step, such as that of Muon, takes the same time for a batch of any size.
                measured = measure(choices.config(asked), source, MEASURE_SECONDS, budget)
        measured = _measure_views(choices, asked, source, measured, budget)
        choose_parts(choices, measured.batch_size, measured.accumulate)
        unused = range_warning(source)
    training = _training_seconds(measured, asked.hours or 0)
    images = measured.images_per_s * training
    config = choices.config(asked, out=asked.out, minutes=float(f"{training / 60:.4g}"))
    expected = _expected(config, measured, len(source))
    warnings = data_warnings(seen) + ([unused] if unused is not None else [])
    warnings += length_warnings(choices, asked, seen, images) + time_warnings(expected, asked)
    return {
        "data": {"name": data_text(asked.data), **asdict(seen)},
        "choices": choices.reasons,
        "command": command_of(choices, asked, config),
        "expected": expected,
        "warnings": warnings,
        "machine": machine(fabric.device),
    }


def _choose_precision(
    choices: Choices, asked: PlanConfig, source: Source, device: torch.device, budget: float
) -> Reach:
    """Measure a small encoder, on a CPU in both precisions; how far others get follows from their arithmetic."""
    small = {"encoder": asked.encoder or ENCODERS[-1], "img_size": asked.img_size or (LOW,)}
    reference = choices.config(asked, batch_size=16, **({} if asked.init is not None else small))
    rates = {"auto": measure(reference, source, PROBE_SECONDS).images_per_s}
    if device.type == "cpu":
        rates["bf16"] = measure(reference.replace(precision="bf16"), source, PROBE_SECONDS).images_per_s
        times = rates["bf16"] / rates["auto"]
        if times > 1.1:
            choices.settings["precision"] = "bf16"
            choices.reasons["precision"] = f"bf16: {times:.1f} times as fast as fp32 on this CPU"
    rate = max(rates.values())
    if asked.init is not None:
        return lambda encoder, size: rate * budget

    @cache
    def flops(encoder: str, size: tuple[int, ...]) -> int:
        with torch.device("meta"):
            config = get_recipe("folder")(encoder=encoder, img_size=size, in_chans=reference.in_chans)
            return build_model(config).flops()

    whole = rate * budget * flops(reference.encoder, reference.img_size)
    return lambda encoder, size: whole / flops(encoder, size)


def _measure_views(choices: Choices, asked: PlanConfig, source: Source, measured: Measured, budget: float) -> Measured:
    """Try more views of fewer images; what was measured of the choice."""
    settings = more_views(choices, asked, measured.batch_size)
    if not settings or measured.accumulate > 1:
        return measured
    seconds = measure(choices.config(asked, **settings), source, PROBE_SECONDS).seconds
    choose_views(choices, settings, seconds / measured.seconds)
    return (
        measure(choices.config(asked), source, MEASURE_SECONDS, budget) if "num_views" in choices.settings else measured
    )


def _expected_images(choices: Choices, asked: PlanConfig, reach: Reach) -> float:
    config = choices.config(asked)
    return reach(config.encoder, config.img_size)


def command_of(choices: Choices, asked: PlanConfig, config: PretrainConfig) -> str:
    """The command that runs the plan; its addresses lack passwords and signatures."""
    flags = {"data": stored_data(asked.data), **choices.settings, "out": asked.out, "minutes": f"{config.minutes:g}"}
    defaults = PlanConfig()
    for name in (*LISTED, *GIVEN):
        if getattr(asked, name) != getattr(defaults, name):
            flags.setdefault(name, getattr(asked, name))
    words = ["dmjd", "pretrain", choices.recipe]
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def _training_seconds(measured: Measured, hours: float) -> float:
    """The training time of a run that ends in time: what is left, at most 90 %, but not less than half of that."""
    most = 3600 * SHARE * hours
    left = 3600 * hours - START_SECONDS - measured.reading - measured.besides.of(most)
    return max(most / 2, min(most, left))


def _expected(config: PretrainConfig, measured: Measured, num_images: int) -> dict[str, float]:
    """What the run of a plan will take and reach."""
    rate = measured.images_per_s
    batch_size = min(config.batch_size or measured.batch_size, num_images)
    training = 60 * (config.minutes or 0)
    others = START_SECONDS + measured.reading + measured.besides.of(training)
    images = rate * training
    checkpoints = 1 + min(KEEP, int(images / batch_size / config.checkpoint_every))
    return {
        "images_per_s": rate,
        "seconds_per_step": batch_size / rate,
        "steps": images / batch_size,
        "epochs": images / num_images,
        "training_minutes": training / 60,
        "reading_minutes": measured.reading / 60,
        "minutes": (training + others) / 60,
        "memory_gb": measured.memory / 1e9,
        "disk_gb": (checkpoints * measured.checkpoint + measured.encoder + _FIGURES) / 1e9,
    }


def plan_table(found: dict[str, Any], now: Callable[[], datetime] = datetime.now) -> Table:
    """The result of :func:`plan` as a table."""
    data, expected = found["data"], found["expected"]
    seen = Overview(**{name: value for name, value in data.items() if name != "name"})
    table = Table(Column("plan"), Column(literal(data["name"])))
    sizes = " to ".join(f"{h} x {w}" for h, w in (seen.smallest, seen.largest))
    table.add_row("images", f"{seen.num_images:,}; {sizes} pixels, typically {seen.typical[0]} x {seen.typical[1]}")
    for name, reason in found["choices"].items():
        table.add_row(name.replace("_", " "), literal(reason))
    table.add_row("speed", f"{expected['images_per_s']:.0f} images/s, {expected['seconds_per_step']:.2g} s a step")
    table.add_row("length", f"{expected['steps']:,.0f} steps, {expected['epochs']:.1f} epochs")
    end = now() + timedelta(minutes=expected["minutes"])
    table.add_row(
        "time",
        f"{expected['training_minutes']:.0f} minutes of training, about {expected['minutes']:.0f} in all; "
        f"if it starts now, until {end:%Y-%m-%d %H:%M}",
    )
    table.add_row("memory", f"{expected['memory_gb']:.1f} GB")
    table.add_row("disk", f"{expected['disk_gb']:.2f} GB")
    return table
