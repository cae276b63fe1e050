"""``dmjd ...``: a thin skin over the public functions, with the same names. Imports no torch before a command runs."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dmjd import __version__
from dmjd.cli_parser import Parser as _Parser
from dmjd.cli_parser import add_run_arguments as _add_run_arguments
from dmjd.cli_use import run_compare, run_embed, run_export
from dmjd.config import PretrainConfig, value_types
from dmjd.dense_config import DenseConfig, DetectionConfig, SegmentationConfig
from dmjd.finetune_config import FinetuneConfig
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
KINDS = ("masks", "targets", "reconstructions", "attention", "neighbours")


def _short(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {len(lines) - MAX_ERROR_LINES + 1} more lines"]
    return "\n".join(lines)


def _add_field(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], defaults: Any) -> None:
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
        description=f"Pre-train an encoder on unlabelled pictures.\n\nrecipes:\n{lines}\n\nDefaults below are those of "
        f"'{recipe}':\n  {_text(RECIPES[recipe])}",
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


def _bench(arguments: Sequence[str]) -> None:
    recipe, rest = "dmjd", list(arguments)
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    parser = _pretrain_parser(recipe)
    parser.prog = "dmjd bench"
    parser.usage = "dmjd bench [RECIPE] [flags]"
    parser.description = (
        "Measure how fast a recipe trains on this machine: pictures a second with and without the loader (--data), "
        "memory,\nshare of the machine's own matrix-multiply rate, and where the time goes. Takes the flags of "
        "dmjd pretrain;\n--steps is the number of measured steps (10), and nothing is written but --json."
    )
    parser.epilog = "example:\n  dmjd bench --encoder vit_tiny_patch4 --img-size 32 --data cifar10 --batch-size 64"
    parser.add_argument("--json", metavar="FILE", help="write the result to a file too")
    given = vars(parser.parse(rest))
    file, steps = given.pop("json"), given.pop("steps", 10)
    config = get_recipe(recipe)(**given)
    from dmjd.checkpoint import write_text
    from dmjd.progress import Console
    from dmjd.speed import bench, bench_table

    result = bench(config, steps)
    if file is not None:
        write_text(Path(file), json.dumps(result, indent=2) + "\n")
    Console().table(bench_table(result))


def _knn_flags(parser: _Parser) -> None:
    _common_evaluation_flags(parser)
    parser.add_argument("--k", type=int, metavar="N", help="neighbours (20); 1, 5, 10, 20 are always reported")
    parser.add_argument("--temperature", type=float, metavar="X", help="of the votes (0.07)")
    _feature_flags(parser)


def _linear_flags(parser: _Parser) -> None:
    _common_evaluation_flags(parser)
    parser.add_argument("--sweep", action="store_true", help="many layers, poolings and rates; best by held-out part")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the features (90)")
    parser.add_argument("--steps", type=int, metavar="N", help="length, instead of epochs")
    parser.add_argument("--blr", type=float, metavar="X", help="base learning rate (0.1)")
    _feature_flags(parser)


def _frozen_flags(parser: _Parser) -> None:
    _common_evaluation_flags(parser)
    _feature_flags(parser)


def _feature_flags(parser: _Parser) -> None:
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at a time (256)")
    parser.add_argument("--precision", metavar="{fp32,bf16}", help="of the features (fp32)")


def _finetune_flags(parser: _Parser) -> None:
    _common_evaluation_flags(parser)
    parser.add_argument("--precision", metavar="{auto,fp32,bf16,fp16}", help="bf16 on a GPU that has it, else fp32")
    group = parser.add_argument_group("fine-tuning")
    for field in dataclasses.fields(FinetuneConfig):
        _add_field(group, field, FinetuneConfig())


def _dense_flags(parser: _Parser, config: DenseConfig, form: str) -> None:
    """Flags of a task whose data has masks or boxes instead of labels."""
    parser.add_argument("run", metavar="RUN", help="run folder, encoder.safetensors or checkpoint")
    parser.add_argument("--data", metavar="SOURCE", help=form)
    parser.add_argument("--test-data", metavar="SOURCE", help="test set of the same form (the test part of --data)")
    _place_flags(parser)
    parser.add_argument("--precision", metavar="{auto,fp32,bf16,fp16}", help="bf16 on a GPU that has it, else fp32")
    group = parser.add_argument_group("training and test")
    for field in dataclasses.fields(config):
        _add_field(group, field, config)


def _place_flags(parser: _Parser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder for evaluation/TASK.json (the run)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="loader processes (by the cores)")
    parser.add_argument("--seed", type=int, metavar="N", help="of random weights, training and subsets (0)")
    parser.add_argument("--device", metavar="TEXT", help="auto, cpu or cuda (auto)")


def _common_evaluation_flags(parser: _Parser) -> None:
    _add_run_arguments(parser, "run folder, encoder.safetensors or checkpoint")
    parser.add_argument("--test-data", metavar="SOURCE", help="labelled test set (the test part of --data)")
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="where labels come from (the run's)")
    _place_flags(parser)
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="use this many labels of each class")
    parser.add_argument("--label-fraction", type=float, metavar="X", help="use this share of each class's labels")
    parser.add_argument("--seeds", type=int, metavar="N", help="repeat; mean and spread (3 with few labels, else 1)")


EVALUATIONS: dict[str, tuple[Callable[[_Parser], None], str]] = {
    "knn": (_knn_flags, "nearest neighbours in the frozen features"),
    "linear": (_linear_flags, "linear probe on the frozen features"),
    "frozen": (_frozen_flags, "kNN, linear probe and sweep in one pass over the pictures"),
    "finetune": (_finetune_flags, "train the whole encoder as a classifier"),
    "segmentation": (
        partial(_dense_flags, config=SegmentationConfig(), form="folder with train/images and train/masks, or table"),
        "train the whole encoder to name every pixel",
    ),
    "detection": (
        partial(_dense_flags, config=DetectionConfig(), form="folder with train/ and train.json in COCO form"),
        "train the whole encoder to find objects",
    ),
}
EXAMPLE_DATA = {"segmentation": "camvid --ignore-index 11", "detection": "bccd"}


def _evaluation_overview() -> str:
    lines = [f"  {name:<13} {text}" for name, (_, text) in EVALUATIONS.items()]
    return "\n".join(
        [
            "usage: dmjd evaluate TASK RUN [flags]",
            "",
            "Measure an encoder on labelled pictures, beside a randomly initialised one.",
            "",
            *lines,
            "",
            "all take --data --test-data --labels --labels-per-class --label-fraction --seeds --seed --device --out;",
            "dmjd evaluate TASK --help lists the flags of a task",
            "",
            "example:",
            "  dmjd evaluate linear runs/first --data cifar10",
        ]
    )


def _evaluate(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_evaluation_overview())
        return
    task, names = arguments[0], list(EVALUATIONS)
    if task not in EVALUATIONS:
        near = difflib.get_close_matches(task, names, n=1, cutoff=0.0)
        raise ValueError(f"unknown evaluation '{task}'; did you mean '{near[0]}'? There are: {', '.join(names)}")
    add_flags, text = EVALUATIONS[task]
    parser = _Parser(
        prog=f"dmjd evaluate {task}",
        usage=f"dmjd evaluate {task} RUN [flags]",
        description=text[0].upper() + text[1:] + ", beside a randomly initialised encoder.",
        epilog=f"example:\n  dmjd evaluate {task} runs/first --data {EXAMPLE_DATA.get(task, 'cifar10')}",
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser)
    given = vars(parser.parse(arguments[1:]))
    if given.pop("sweep", False):
        task = "linear_sweep"
    run = given.pop("run")
    from dmjd import evaluation
    from dmjd.progress import Console

    with contextlib.suppress(evaluation.Stopped):  # by a signal, after saving: no result yet, and no failure
        if task == "frozen":
            results = evaluation.evaluate_all({name: {} for name in evaluation.TASKS}, run, **given)
        else:
            results = {task: evaluation.evaluate(task, run, **given)}
        Console().table(evaluation.results_table(results))


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
    "evaluate": (_evaluate, "kNN, linear probe, fine-tuning, segmentation, detection"),
    "show": (_show, "pictures of masks, targets, reconstructions, attention, neighbours"),
    "embed": (run_embed, "features of every picture as a table"),
    "export": (run_export, "the encoder for timm, ONNX or as one file"),
    "compare": (run_compare, "evaluations of several runs side by side"),
    "bench": (_bench, "speed, memory and share of this machine's own limit"),
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
