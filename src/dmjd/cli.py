"""``dmjd ...``: a thin skin over the public functions, with the same names. Imports no torch before a command runs."""

import argparse
import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dmjd import __version__
from dmjd.cli_parser import Parser as _Parser
from dmjd.cli_parser import add_run_arguments as _add_run_arguments
from dmjd.cli_use import run_compare, run_embed, run_export
from dmjd.config import PretrainConfig, value_types
from dmjd.recipes import RECIPES, get_recipe

MAX_ERROR_LINES = 10
GROUPS = {
    "run": "the run",
    "data": "data",
    "encoder": "encoder",
    "method": "method",
    "training": "training",
    "machine": "machine",
}
EVALUATIONS = ("knn", "linear")
KINDS = ("masks", "targets", "reconstructions", "attention", "neighbours")


def _short(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {len(lines) - MAX_ERROR_LINES + 1} more lines"]
    return "\n".join(lines)


def _add_field(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], defaults: PretrainConfig) -> None:
    """One flag from one configuration field; absent flags stay out of the namespace, so recipes keep their values."""
    kind, many, _ = value_types(field.type)
    flag = "--" + field.name.replace("_", "-")
    value = getattr(defaults, field.name)
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    text = field.metadata["help"] + (f" ({shown})" if value is not None and kind is not bool else "")
    common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        on = "" if value else "off unless given: "
        common["help"] = on + field.metadata["help"]
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        return
    if field.metadata["choices"]:
        common["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
    else:
        common["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    if many:
        common["nargs"] = "+"
    group.add_argument(flag, type=kind, **common)


def _pretrain_parser(recipe: str) -> _Parser:
    defaults = get_recipe(recipe)()
    names = ", ".join(RECIPES)
    parser = _Parser(
        prog="dmjd pretrain",
        usage="dmjd pretrain [RECIPE] --data SOURCE --out DIR [flags]",
        description=f"Pre-train an encoder on unlabelled pictures.\n\nrecipes: {names}; defaults below are those of "
        f"'{recipe}':\n  {inspect.getdoc(RECIPES[recipe])}",
        epilog="examples:\n"
        "  dmjd pretrain digits --out runs/first\n"
        "  dmjd pretrain folder --data ~/pictures --out runs/mine\n"
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
    from dmjd.training import pretrain

    pretrain(config)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="dmjd evaluate",
        usage="dmjd evaluate {knn,linear} RUN [flags]",
        description="Measure an encoder on labelled pictures, beside a randomly initialised one and raw pixels.",
        epilog="example:\n  dmjd evaluate linear runs/first --data cifar10",
    )
    parser.add_argument("task", metavar="TASK", help="knn or linear")
    _add_run_arguments(parser, "run folder, encoder.safetensors or checkpoint")
    parser.add_argument("--test-data", metavar="SOURCE", help="labelled test set (the test part of --data)")
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="where labels come from (the run's)")
    parser.add_argument("--out", metavar="DIR", help="folder for evaluation/TASK.json (the run)")
    parser.add_argument("--k", type=int, metavar="N", help="knn: neighbours (20)", default=argparse.SUPPRESS)
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="knn: of the votes (0.07)", default=argparse.SUPPRESS
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="linear: passes (90)", default=argparse.SUPPRESS)
    parser.add_argument("--blr", type=float, metavar="X", help="linear: base learning rate", default=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="pictures at a time (256)")
    parser.add_argument("--precision", default="fp32", metavar="{fp32,bf16}", help="of the features (fp32)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="loader processes (by the cores)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random encoder and the probe (0)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu or cuda (auto)")
    given = vars(parser.parse(arguments))
    task = given.pop("task")
    if task not in EVALUATIONS:
        near = difflib.get_close_matches(task, EVALUATIONS, n=1, cutoff=0.0)
        raise ValueError(f"unknown evaluation '{task}'; did you mean '{near[0]}'? There are: {', '.join(EVALUATIONS)}")
    from dmjd import evaluation
    from dmjd.progress import Console

    result = evaluation.evaluate(task, given.pop("run"), **given)
    Console().table(evaluation.results_table({task: result}))


def _show(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="dmjd show",
        usage="dmjd show {masks,targets,reconstructions,attention,neighbours} RUN --out PICTURE.png [flags]",
        description="Draw what a run's model sees, is asked for and answers; what its encoder attends to;\n"
        "which pictures it finds alike.",
        epilog="examples:\n"
        "  dmjd show neighbours runs/first --out neighbours.png\n"
        "  dmjd show reconstructions runs/first --out picture.png",
    )
    parser.add_argument("kind", metavar="KIND", help="masks, targets, reconstructions, attention or neighbours")
    _add_run_arguments(parser, "run folder")
    parser.add_argument("--out", metavar="FILE", default="picture.png", help="where the picture goes (picture.png)")
    parser.add_argument("--num-images", type=int, default=4, metavar="N", help="pictures, or queries (4)")
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="neighbours: of classes (the run's)")
    parser.add_argument(
        "--num-candidates", type=int, default=2000, metavar="N", help="neighbours: pictures searched (2000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of pictures and masks (0)")
    given = vars(parser.parse(arguments))
    kind = given.pop("kind")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)
        raise ValueError(f"cannot show '{kind}'; did you mean '{near[0]}'? There are: {', '.join(KINDS)}")
    from dmjd.visualize import show

    print(show(kind, given.pop("run"), **given))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "pretrain": (_pretrain, "train an encoder on unlabelled pictures"),
    "evaluate": (_evaluate, "kNN or linear probe beside its baselines"),
    "show": (_show, "pictures of masks, targets, reconstructions, attention, neighbours"),
    "embed": (run_embed, "features of every picture as a table"),
    "export": (run_export, "the encoder for timm, ONNX or as one file"),
    "compare": (run_compare, "evaluations of several runs side by side"),
}


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"dmjd {__version__}: pre-train vision encoders on your own unlabelled pictures",
            "",
            "usage: dmjd COMMAND [flags]",
            "",
            *lines,
            "",
            "dmjd COMMAND --help lists its flags; dmjd --version prints the version",
            "",
            "example:",
            "  dmjd pretrain digits --out runs/first",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for a mistake the user can mend (one short message on stderr, no traceback); 130 after Ctrl-C outside
        of training, which saves and returns 0.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors; PyTorch reads it when it starts
    try:
        if given[0] not in COMMANDS:
            near = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.0)
            raise ValueError(f"unknown command '{given[0]}'; did you mean '{near[0]}'? Commands: {', '.join(COMMANDS)}")
        COMMANDS[given[0]][0](given[1:])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError) as error:  # the latter: training diverged
        print(_short(f"error: {error}"), file=sys.stderr)
        return 2
    return 0
