"""The command ``dmjd inspect``."""

import dataclasses
import json
from collections.abc import Sequence

from dmjd.cli.parser import Parser, add_field
from dmjd.config.checks import check_path
from dmjd.config.inspection import DATA, READING, InspectConfig


def run_inspect(arguments: Sequence[str]) -> None:
    """``dmjd inspect``: see :func:`dmjd.inspect`."""
    parser = Parser(
        prog="dmjd inspect",
        usage="dmjd inspect DATA [DATA ...] [--out FIGURE.png] [flags]",
        description="Look at images before training on them: number, formats, sizes, channels, unreadable and equal\n"
        "images, classes, and how long an epoch of reading takes on this machine.",
        epilog="examples:\n  dmjd inspect ~/images --out images.png\n"
        "  dmjd inspect ~/labeled --labels folder --sample 0 --json images.json",
    )
    parser.add_argument("data", metavar="DATA", nargs="+", help="images, as for dmjd pretrain")
    groups = {title: parser.add_argument_group(title) for title in (DATA, READING)}
    for field in (field for field in dataclasses.fields(InspectConfig) if field.name != "data"):
        add_field(groups[field.metadata["group"]], field, InspectConfig())
    parser.add_argument("--out", metavar="FILE", help="figure to write; default none")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to a file")
    given = parser.parse(arguments)
    file, out = given.pop("json"), given.pop("out")
    given["data"] = given["data"][0] if len(given["data"]) == 1 else tuple(given["data"])
    InspectConfig(**given)
    file = None if file is None else check_path("--json", file)
    from dmjd.engine.console import Console  # these import torch
    from dmjd.figures.inspection import inspect, inspection_table
    from dmjd.files import check_writable, make_folder, write_text

    if file is not None:
        check_writable(file, flag="--json")
    found = inspect(out=out, **given)
    if file is not None:
        make_folder(file.parent)
        write_text(file, json.dumps(found, indent=2) + "\n")
    Console().table(inspection_table(found))
