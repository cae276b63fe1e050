"""``dmjd pretrain``, ``dmjd bench`` and ``dmjd plan``."""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from dmjd.cli.parser import Parser, add_field
from dmjd.config.checks import check_path
from dmjd.config.plan import DATA, DECIDED, MACHINE, PlanConfig
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.recipes import RECIPES, get_recipe
from dmjd.config.unused import flags_without_effect
from dmjd.warning import DMJDWarning

GROUPS = {
    "run": "the run",
    "data": "data",
    "encoder": "encoder",
    "method": "method",
    "training": "training",
    "machine": "machine",
}


def run_pretrain(arguments: Sequence[str]) -> None:
    """``dmjd pretrain``: see :func:`dmjd.pretrain`."""
    recipe, flags = _split_recipe(arguments)
    config = _config(recipe, _pretrain_parser(recipe).parse(flags))
    from dmjd.pretraining.run import pretrain  # imports torch

    pretrain(config)


def run_bench(arguments: Sequence[str]) -> None:
    """``dmjd bench``: see :func:`dmjd.bench`."""
    recipe, flags = _split_recipe(arguments)
    parser = _pretrain_parser(recipe)
    parser.prog = "dmjd bench"
    parser.usage = "dmjd bench [RECIPE] [flags]"
    parser.description = (
        "Measure the training speed of a recipe on this machine: images/s with and without the loader (--data),\n"
        "memory, MFU, and the time of each part. Takes the flags of dmjd pretrain; --steps is the number of\n"
        "measured steps (10). Nothing is written but --json."
    )
    parser.epilog = "example:\n  dmjd bench --encoder vit_tiny_patch4 --img-size 32 --data cifar10 --batch-size 64"
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    given = parser.parse(flags)
    file, steps = given.pop("json"), given.pop("steps", 10)
    config = _config(recipe, given)
    file = None if file is None else check_path("--json", file)
    from dmjd.engine.console import Console  # these import torch
    from dmjd.files import check_writable, make_folder, write_text
    from dmjd.pretraining.bench import bench, bench_table

    if file is not None:
        check_writable(file, flag="--json")
    result = bench(config, steps)
    if file is not None:
        make_folder(file.parent)
        write_text(file, json.dumps(result, indent=2) + "\n")
    Console().table(bench_table(result))


def run_plan(arguments: Sequence[str]) -> None:
    """``dmjd plan``: see :func:`dmjd.plan`."""
    parser = Parser(
        prog="dmjd plan",
        usage="dmjd plan --data SOURCE --hours H [flags]",
        description="What to run on your images in a given time on this machine: looks at the images, measures real\n"
        "steps for about a minute, and prints settings with their reasons, what to expect, and the command.",
        epilog="examples:\n  dmjd plan --data ~/images --hours 2\n"
        "  dmjd plan --data ~/images --hours 2 --teacher tf_efficientnet_lite0 --json plan.json",
    )
    groups = {title: parser.add_argument_group(title) for title in (DATA, DECIDED, MACHINE)}
    fields = dataclasses.fields(PlanConfig)
    for field in fields:
        add_field(groups[field.metadata["group"]], field, PlanConfig())
    parser.add_argument("--json", metavar="FILE", help="also write the plan to a file")
    given = parser.parse(arguments)
    file = given.pop("json")
    PlanConfig(**given).check_complete()
    file = None if file is None else check_path("--json", file)
    from dmjd.engine.console import Console  # these import torch
    from dmjd.files import check_writable, make_folder, write_text
    from dmjd.pretraining.plan import plan, plan_table

    if file is not None:
        check_writable(file, flag="--json")
    found, console = plan(**given), Console()
    if file is not None:
        make_folder(file.parent)
        write_text(file, json.dumps(found, indent=2) + "\n")
    console.table(plan_table(found))
    for text in found["warnings"]:
        console.warn(text)
    print(found["command"])


def _config(recipe: str, given: dict[str, Any]) -> PretrainConfig:
    """The configuration of a recipe with the flags that were given; warns of those without effect."""
    config = get_recipe(recipe)(**given)
    for text in flags_without_effect(config, given):
        warnings.warn(text, DMJDWarning, stacklevel=3)
    return config


def _split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split arguments into recipe and flags."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return "dmjd", list(arguments)


def _pretrain_parser(recipe: str) -> Parser:
    defaults = get_recipe(recipe)()
    lines = "\n".join(f"  {name:<15}{_doc(function).splitlines()[0]}" for name, function in RECIPES.items())
    parser = Parser(
        prog="dmjd pretrain",
        usage="dmjd pretrain [RECIPE] --data SOURCE --out DIR [flags]",
        description=f"Pre-train an encoder on unlabeled images.\n\nrecipes:\n{lines}\n\n"
        f"The defaults below are those of '{recipe}'{_others(recipe)}:\n  {_doc(RECIPES[recipe])}",
        epilog="examples:\n"
        "  dmjd pretrain digits --out runs/first\n"
        "  dmjd pretrain folder --data ~/images --out runs/mine\n"
        "  dmjd pretrain folder --data ~/photos ~/scans:0.3 --out runs/mine\n"
        "  torchrun --nproc-per-node 8 -m dmjd pretrain --data imagenet/train --out runs/in1k --batch-size 512",
    )
    fields = [f for f in dataclasses.fields(PretrainConfig) if f.name != "recipe"]
    group = parser.add_argument_group("common")
    for field in (f for f in fields if f.metadata["common"]):
        add_field(group, field, defaults)
    for key, title in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in (f for f in fields if f.metadata["group"] == key and not f.metadata["common"]):
            add_field(group, field, defaults)
    return parser


def _others(recipe: str) -> str:
    """Where the defaults are that users of their own images need, if these are not they."""
    return "" if recipe == "folder" else "; dmjd pretrain folder --help has those for your own images"


def _doc(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").replace("``", "")
