"""``inspect(data)``: what a set of images is, before anything is trained on it; with a figure."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Column, Table

from dmjd.config.fields import LIST_SETTINGS, SPLITS
from dmjd.config.inspection import InspectConfig
from dmjd.config.recipes import folder
from dmjd.config.sources import Data
from dmjd.data.inspection import Inspection, class_counts, reading_speed
from dmjd.data.sources.base import RemoteOptions, Source
from dmjd.data.sources.registry import has_split, open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.train_loader import Augment, CroppedImages
from dmjd.engine.console import Console, literal, tracked
from dmjd.figures.grid import figure_path, save_figure
from dmjd.figures.panels import DPI
from dmjd.figures.render import to_rgb
from dmjd.rng import image_keys

_COLUMNS, _ROWS = 8, 2  # of the crops

_MOST_BARS = 12  # classes in the figure


def inspect(data: Data | None = None, *, out: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Look at a set of images as a run would read it. Nothing but ``out`` is written.

    Args:
        data: images, as for :func:`dmjd.pretrain`; several sets are looked at as one.
        out: figure to write: sample crops as the encoder would see them, sizes, formats, classes.
        settings: see :class:`~dmjd.config.inspection.InspectConfig`.

    Returns:
        "num_images", "looked_at"; "formats" and "channels", counts by name; "bytes", of an image; "sizes", [height,
        width]; "unreadable", with reasons; "equal", images stored with the same bytes; "splits", images in each part;
        "classes", counts by part and what a part lacks, or None; "reading", images/s and minutes of an epoch.

    Raises:
        ValueError: if the images cannot be opened, none can be read, or ``out`` cannot be written.
    """
    asked = InspectConfig(data=data if data is None or isinstance(data, str) else tuple(data), **settings)
    asked.check_complete()
    file = None if out is None else figure_path(out)
    parts = _parts(asked)
    source = next(iter(parts.values()))
    inspection, console = Inspection(source, asked.sample), Console()
    for _ in tracked(inspection.look(), "looking at images", len(inspection.indices), lambda count: count):
        pass
    found = {"name": source.name} | inspection.summary()
    found["splits"] = {split: len(part) for split, part in parts.items()}
    found["classes"] = class_counts(parts)
    config = folder(img_size=asked.img_size)
    size, scale = config.size, (config.crop_scale[0], config.crop_scale[1])
    console.wait("timing the reading ...")
    found["reading"] = reading_speed(source, size, scale, asked.num_workers, asked.seed)
    console.close()
    if file is not None:
        crops = _crops(SubsetSource(source, inspection.readable), size, scale, asked.seed)
        save_figure(_figure(found, inspection.sides, crops), file)
    return found


def _parts(asked: InspectConfig) -> dict[str, Source]:
    """The parts of the set, by split. Where the validation part serves as test part, it is there once."""
    assert asked.data is not None
    value_range = None if asked.value_range is None else (asked.value_range[0], asked.value_range[1])
    reading = {name: getattr(asked, name) for name in (*LIST_SETTINGS, "labels", "in_chans", "nodata", "alpha")}
    parts, remote = {}, RemoteOptions(asked.cache_dir, asked.cache_gb)
    for split in SPLITS:
        if split == SPLITS[0] or has_split(asked.data, split):
            part = open_source(asked.data, split=split, value_range=value_range, remote=remote, **reading)
            parts[part.split] = part
    return parts


def _crops(readable: Source, size: tuple[int, int], scale: tuple[float, float], seed: int) -> torch.Tensor:
    """Crops [n, C, h, w] of evenly spaced images, as in the first epoch of a run."""
    rows = np.unique(np.linspace(0, len(readable) - 1, _COLUMNS * _ROWS).astype(np.int64))
    index = torch.from_numpy(rows)
    keys = image_keys(seed, torch.zeros_like(index), index)
    return CroppedImages(readable, Augment(size, scale, flip=True))((rows, keys.numpy()))[0]


def inspection_table(found: dict[str, Any]) -> Table:
    """The result of :func:`inspect` as a table."""
    table = Table(Column("images"), Column(literal(found["name"])))
    sizes, reading, unreadable, equal = (found[key] for key in ("sizes", "reading", "unreadable", "equal"))
    table.add_row("number", ", ".join(f"{count:,} {split}" for split, count in found["splits"].items()))
    if found["looked_at"] < found["num_images"]:
        split = next(iter(found["splits"]))
        table.add_row("looked at", f"{found['looked_at']:,} {split}, evenly spaced; --sample 0: all")
    table.add_row("formats", _counts(found["formats"]))
    table.add_row("channels", _counts(found["channels"]))
    smallest, median, largest = (f"{h} x {w}" for h, w in (sizes[key] for key in ("smallest", "median", "largest")))
    table.add_row("pixels", f"{smallest} to {largest}, median {median}; {sizes['different']} different size(s)")
    total = found["bytes"]["mean"] * found["num_images"]
    table.add_row("size", f"{_in_bytes(found['bytes']['median'])} an image (median); {_in_bytes(total)} in all")
    if (invalid := found["invalid"])["images"]:
        table.add_row("invalid", f"{invalid['share']:.1%} of the values; some in {invalid['images']:,} image(s)")
    table.add_row("unreadable", f"{unreadable['count']:,}")
    for reason, count in unreadable["reasons"].items():
        table.add_row("", literal(f"{count}: {reason}"))
    for name, _ in unreadable["first"][:5]:
        table.add_row("", literal(name))
    table.add_row("equal", f"{equal['count']:,} image(s) with the bytes of an earlier one")
    for first, second in equal["first"]:
        table.add_row("", literal(f"{second} = {first}"))
    for split, lines in _class_lines(found["classes"], found["splits"]).items():
        table.add_row(split, literal(lines))
    if reading["in_memory"]:
        text = f"{reading['images_per_s']:.0f} images/s once, {reading['epoch_minutes']:.1f} min; then from memory"
    else:
        text = f"{reading['images_per_s']:.0f} images/s with {reading['workers']} worker(s): "
        text += f"{reading['epoch_minutes']:.1f} min an epoch without training"
    table.add_row("reading", text)
    return table


def _in_bytes(number: float) -> str:
    """A number of bytes in the unit that suits it: "999 bytes", "1.2 kB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def _class_lines(classes: dict[str, Any] | None, splits: dict[str, int]) -> dict[str, str]:
    """Rows of the table on classes."""
    if classes is None:
        return {}
    rows = {}
    for split in splits:
        numbers = [own[split] for own in classes["counts"].values() if own[split]]
        span = f"{min(numbers):,} to {max(numbers):,} images each" if numbers else ""
        lacks = classes["missing"].get(split, [])
        text = f"; lacks {', '.join(lacks[:5])}{', ...' if len(lacks) > 5 else ''}" if lacks else ""
        rows[f"classes, {split}"] = f"{len(numbers)}: {span}{text}"
    return rows


def _figure(found: dict[str, Any], sides: np.ndarray, crops: torch.Tensor) -> Figure:
    """Crops above; sizes, formats with channels, and classes below."""
    figure = Figure(figsize=(11, 6.6), dpi=DPI, layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(1.15, 1), squeeze=False)[:, 0]
    parts[0].suptitle("crops as the encoder would see them", fontsize=10)
    grid = parts[0].subplots(_ROWS, _COLUMNS).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image in zip(grid, to_rgb(crops).numpy(), strict=False):
        axes.imshow(image)
    shown = found["classes"] is not None
    panels = parts[1].subplots(1, 2 + shown)
    _draw_sizes(panels[0], sides)
    kinds = found["formats"] | found["channels"]
    _draw_bars(panels[1], kinds, "formats and channels")
    if shown:
        split = next(iter(found["splits"]))
        counts = {name: own[split] for name, own in found["classes"]["counts"].items()}
        most = dict(sorted(counts.items(), key=lambda item: -item[1])[:_MOST_BARS])
        title = f"classes, {split}" + (f" (the largest of {len(counts)})" if len(counts) > _MOST_BARS else "")
        _draw_bars(panels[2], most, title)
    return figure


def _draw_sizes(axes: Axes, sides: np.ndarray) -> None:
    """Width against height, [n, 2] (height, width); larger dots for sizes of many images."""
    sides, counts = np.unique(sides[:, ::-1], axis=0, return_counts=True)
    axes.scatter(sides[:, 0], sides[:, 1], s=12 + 80 * counts / counts.max(), alpha=0.5)
    axes.set(title="size in pixels", xlabel="width", ylabel="height", xlim=(0, None), ylim=(0, None))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, counts: dict[str, int], title: str) -> None:
    names = [name if len(name) <= 24 else f"{name[:23]}..." for name in counts]
    bars = axes.barh(range(len(names)), list(counts.values()))
    axes.bar_label(bars, fontsize=8, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.15)
