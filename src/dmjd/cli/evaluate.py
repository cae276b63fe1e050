"""``dmjd evaluate``."""

import argparse
import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from functools import partial

from dmjd.cli.parser import Parser as _Parser
from dmjd.cli.parser import _add_field
from dmjd.cli.parser import add_run_arguments as _add_run_arguments
from dmjd.config.dense import DenseConfig, DetectionConfig, SegmentationConfig
from dmjd.config.finetune import FinetuneConfig


def _knn_flags(parser: _Parser) -> None:
    _common_evaluation_flags(parser)
    parser.add_argument("--k", type=int, metavar="N", help="neighbors (20); 1, 5, 10, 20 are always reported")
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
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (256)")
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
    parser.add_argument("--test-data", metavar="SOURCE", help="labeled test set (the test part of --data)")
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="where labels come from (the run's)")
    _place_flags(parser)
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="use this many labels of each class")
    parser.add_argument("--label-fraction", type=float, metavar="X", help="use this share of each class's labels")
    parser.add_argument("--seeds", type=int, metavar="N", help="repeat; mean and spread (3 with few labels, else 1)")


EVALUATIONS: dict[str, tuple[Callable[[_Parser], None], str]] = {
    "knn": (_knn_flags, "nearest neighbors in the frozen features"),
    "linear": (_linear_flags, "linear probe on the frozen features"),
    "frozen": (_frozen_flags, "kNN, linear probe and sweep in one pass over the images"),
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
            "Measure an encoder on labeled images, beside a randomly initialized one.",
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
        description=text[0].upper() + text[1:] + ", beside a randomly initialized encoder.",
        epilog=f"example:\n  dmjd evaluate {task} runs/first --data {EXAMPLE_DATA.get(task, 'cifar10')}",
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser)
    given = vars(parser.parse(arguments[1:]))
    if given.pop("sweep", False):
        task = "linear_sweep"
    run = given.pop("run")
    from dmjd.engine.console import Console
    from dmjd.evaluation.frozen.protocol import TASKS, evaluate_all
    from dmjd.evaluation.registry import evaluate
    from dmjd.evaluation.supervised.trainer import Stopped
    from dmjd.evaluation.tables import results_table

    with contextlib.suppress(Stopped):  # by a signal, after saving: no result yet, and no failure
        if task == "frozen":
            results = evaluate_all({name: {} for name in TASKS}, run, **given)
        else:
            results = {task: evaluate(task, run, **given)}
        Console().table(results_table(results))
