"""``dmjd evaluate``: overview and flags are made from the table of evaluations."""

import contextlib
import dataclasses
from collections.abc import Sequence

from dmjd.cli.parser import Parser, add_field, add_run_argument, flag_of
from dmjd.config.checks import shown
from dmjd.config.evaluation import COMMON, EvaluationConfig, FrozenConfig
from dmjd.evaluation.registry import TASKS, frozen_names
from dmjd.suggest import did_you_mean

FROZEN = "frozen"  # on the command line: all tasks on frozen features

_RUN_HELP = "run folder, encoder file or checkpoint"


def run_evaluate(arguments: Sequence[str]) -> None:
    """``dmjd evaluate``: see :func:`dmjd.evaluate`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    task = arguments[0]
    names = [*TASKS, FROZEN]
    if task not in names:
        raise ValueError(f"unknown evaluation {shown(task)}{did_you_mean(task, names)} Evaluations: {', '.join(names)}")
    given = _parser(task).parse(arguments[1:])
    run = given.pop("run")
    from dmjd.engine.console import Console  # these import torch
    from dmjd.evaluation.frozen.protocol import evaluate_all
    from dmjd.evaluation.results import results_folder
    from dmjd.evaluation.run import evaluate
    from dmjd.evaluation.supervised.trainer import Stopped
    from dmjd.evaluation.tables import context_lines, results_table

    with contextlib.suppress(Stopped):  # stopped by a signal, after saving: there is no result yet
        if task == FROZEN:
            results = evaluate_all({name: {} for name in frozen_names()}, run, **given)
        else:
            result = evaluate(task, run, **given)
            results = {result.get("task", task): result}  # linear --sweep is linear_sweep
        Console().table(results_table(results), *context_lines(results, results_folder(run, given.get("out"))))


def _overview() -> str:
    texts = {name: task.help for name, task in TASKS.items()} | {FROZEN: _frozen_help()}
    lines = [f"  {name:<13} {text}" for name, text in texts.items()]
    flags = " ".join(flag_of(field.name) for field in dataclasses.fields(EvaluationConfig))
    return "\n".join(
        [
            "usage: dmjd evaluate TASK RUN [flags]",
            "",
            "Evaluate an encoder on labeled images, together with a randomly initialized one.",
            "",
            *lines,
            "",
            f"All take {flags}.",
            "dmjd evaluate TASK --help lists the flags of a task.",
            "",
            "example:",
            "  dmjd evaluate linear runs/first --data cifar10",
        ]
    )


def _frozen_help() -> str:
    return f"all of {', '.join(frozen_names())}, in one pass over the images"


def _parser(task: str) -> Parser:
    config: type[EvaluationConfig] = FrozenConfig
    text, example = _frozen_help(), "cifar10"
    if task != FROZEN:
        config, text, example = TASKS[task].load_config(), TASKS[task].help, TASKS[task].example
    parser = Parser(
        prog=f"dmjd evaluate {task}",
        usage=f"dmjd evaluate {task} RUN [flags]",
        description=f"{text[0].upper()}{text[1:]}, together with a randomly initialized encoder.",
        epilog=f"example:\n  dmjd evaluate {task} runs/first --data {example}",
    )
    add_run_argument(parser, _RUN_HELP)
    own = parser.add_argument_group("the task")
    shared = parser.add_argument_group("data and machine")
    for field in dataclasses.fields(config):
        add_field(shared if field.metadata["group"] == COMMON else own, field, config())
    if task == "linear":
        own.add_argument("--sweep", action="store_true", help="the task linear_sweep: many layers and rates")
    return parser
