"""``dmjd pretrain`` and ``dmjd bench``."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmjd.cli.parser import Parser as _Parser
from dmjd.cli.parser import _add_field
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.recipes import RECIPES, get_recipe

GROUPS = {
    "run": "the run",
    "data": "data",
    "encoder": "encoder",
    "method": "method",
    "training": "training",
    "machine": "machine",
}


def _text(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").replace("``", "")


def _first_line(function: Callable[..., Any]) -> str:
    return _text(function).splitlines()[0]


def _pretrain_parser(recipe: str) -> _Parser:
    defaults = get_recipe(recipe)()
    lines = "\n".join(f"  {name:<15}{_first_line(function)}" for name, function in RECIPES.items())
    parser = _Parser(
        prog="dmjd pretrain",
        usage="dmjd pretrain [RECIPE] --data SOURCE --out DIR [flags]",
        description=f"Pre-train an encoder on unlabeled images.\n\nrecipes:\n{lines}\n\nDefaults below are those of "
        f"'{recipe}':\n  {_text(RECIPES[recipe])}",
        epilog="examples:\n"
        "  dmjd pretrain digits --out runs/first\n"
        "  dmjd pretrain folder --data ~/images --out runs/mine\n"
        "  torchrun --nproc-per-node 8 -m dmjd pretrain --data imagenet/train --out runs/in1k --batch-size 512",
    )
    fields = [f for f in dataclasses.fields(PretrainConfig) if f.name != "recipe"]
    group = parser.add_argument_group("common")
    for field in (f for f in fields if f.metadata["common"]):
        _add_field(group, field, defaults)
    for key, title in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in (f for f in fields if f.metadata["group"] == key and not f.metadata["common"]):
            _add_field(group, field, defaults)
    return parser


def _pretrain(arguments: Sequence[str]) -> None:
    recipe, rest = "dmjd", list(arguments)
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
        get_recipe(recipe)
    given = vars(_pretrain_parser(recipe).parse(rest))
    config = get_recipe(recipe)(**given)
    from dmjd.pretraining.run import pretrain

    pretrain(config)


def _bench(arguments: Sequence[str]) -> None:
    recipe, rest = "dmjd", list(arguments)
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    parser = _pretrain_parser(recipe)
    parser.prog = "dmjd bench"
    parser.usage = "dmjd bench [RECIPE] [flags]"
    parser.description = (
        "Measure how fast a recipe trains on this machine: images/s with and without the loader (--data), "
        "memory,\nshare of the machine's own matrix-multiply rate, and where the time goes. Takes the flags of "
        "dmjd pretrain;\n--steps is the number of measured steps (10), and nothing is written but --json."
    )
    parser.epilog = "example:\n  dmjd bench --encoder vit_tiny_patch4 --img-size 32 --data cifar10 --batch-size 64"
    parser.add_argument("--json", metavar="FILE", help="write the result to a file too")
    given = vars(parser.parse(rest))
    file, steps = given.pop("json"), given.pop("steps", 10)
    config = get_recipe(recipe)(**given)
    from dmjd.engine.console import Console
    from dmjd.files import write_text
    from dmjd.pretraining.bench import bench, bench_table

    result = bench(config, steps)
    if file is not None:
        write_text(Path(file), json.dumps(result, indent=2) + "\n")
    Console().table(bench_table(result))
