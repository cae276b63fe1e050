"""Wrong command lines, made from the parsers themselves: every flag of every command with values it must refuse."""

import argparse
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmjd.cli.failures import MAX_ERROR_LINES
from dmjd.cli.main import main
from dmjd.cli.parser import Parser
from dmjd.evaluation.registry import TASKS
from dmjd.figures.kinds import KINDS

SECONDS = 5.0  # a mistake is refused within

# Command lines that lack nothing. The runs do not exist: what is wrong with a flag comes first.
COMPLETE = {
    "pretrain digits": ["--out", "run", "--device", "cpu"],
    "bench digits": ["--device", "cpu", "--steps", "1"],
    **{f"evaluate {task} no-run": [] for task in (*TASKS, "frozen")},
    **{f"show {kind} no-run": [] for kind in KINDS},
    "inspect digits": [],
    "embed no-run": ["--out", "features.npy"],
    "export no-run": ["--format", "timm", "--out", "encoder.safetensors"],
    "compare no-run other-run": [],
}

HUGE = "1" + "0" * 30

WRONG = {
    int: ["x", "1.5", "nan", "inf", "", HUGE, f"-{HUGE}", "9" * 5000, "1e6", "0x10", "1,2", "٣.٣", "None"],
    float: ["x", "nan", "inf", "-inf", "", "1e308", "-1e308", "1,5", "1..2", "9" * 400, "None"],
    str: ["", " "],
    bool: ["yes", "1", "", "false"],
}

UNKNOWN = {  # flags that name something
    "encoder": ["vit_tinny_patch8", "resnet50", "vit_tiny_patch0", "vit_tiny_patch999999999999", "[/b]", "\x1b[31m"],
    "target": ["hogg", "Hog"],
    "mim_target": ["hogg"],
    "vis_target": ["pixels"],
    "masks": ["disjunct", "random"],
    "data": ["no/such/folder", "no/such.parquet", "./digitz"],
    "format": ["tim", "torchscript"],
    "device": ["gpu", "cuda:0", "cpu,cuda"],
    "precision": ["fp64", "16"],
    "labels": ["folders", "x"],
    "split": ["vall", "x"],
    "mim_loss": ["l3"],
    "optimizer": ["sgd"],
}


@dataclass(frozen=True)
class WrongLine:
    """A command line, and texts of which the message must hold one."""

    arguments: tuple[str, ...]
    named: tuple[str, ...]


def parser_of(command: str) -> Parser:
    """The parser that a command makes."""

    found: list[Parser] = []

    def note(self: Parser, arguments: list[str]) -> dict:
        found.append(self)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse", note)
        assert main(command.split()) == 0
    return found[0]


def lines_of_flag(action: argparse.Action, start: list[str], complete: list[str]) -> list[WrongLine]:
    """Wrong uses of one flag."""
    flag = next(text for text in action.option_strings if text.startswith("--"))
    others = without(complete, action)
    switch = action.nargs == 0
    kind = bool if switch else action.type or str
    names = UNKNOWN.get(action.dest, ()) if action.dest != "data" or "no-run" not in start else ()
    values = [*WRONG[kind], *names, *(["no such choice"] if action.choices else ())]
    named = (flag,) if "_" in action.dest else (flag, action.dest)
    lines = [WrongLine((*start, *others, f"{flag}={value}"), (*named, value[:20] or flag)) for value in values]
    lines += [WrongLine((*start, *others, f"{flag}x"), (f"{flag}x",))]
    if action.dest not in flag:  # a setting's name in Python is no flag
        lines += [WrongLine((*start, *others, f"--{action.dest}"), (f"--{action.dest}",))]
    if not switch and action.nargs != "?":  # which may stand alone
        lines += [WrongLine((*start, *others, flag), (flag,))]
    if not switch:
        lines += [WrongLine((*start, flag, *others, "--flop"), (flag, "--flop"))]
    return lines


def without(complete: list[str], action: argparse.Action) -> list[str]:
    """The flags of a complete command line without one of them."""
    pairs = zip(complete[::2], complete[1::2], strict=True)
    return [text for flag, value in pairs if flag not in action.option_strings for text in (flag, value)]


def other_lines(start: list[str], complete: list[str]) -> list[WrongLine]:
    """A positional argument too many, an empty one, one that is no name, and one that is missing."""
    command, *names = start
    lines = [WrongLine((*start, *complete, "--no-such-flag", "3"), ("--no-such-flag",))]
    lines += [WrongLine((command, *names[:-1], name, *complete), ("RUN", "unknown", "empty")) for name in ("", " ")]
    if command not in ("pretrain", "bench", "compare"):
        lines += [WrongLine((*start, "too-many", *complete), ("too-many",))]
        lines += [WrongLine((command, *names[:-1], *complete), ("RUN", "kind", "KIND"))]
    if command in ("show", "evaluate", "pretrain", "bench"):
        for name in ("nonsense", "knnn", "[/b]", "$x$", "\x1b[31m", "x" * 5000, "café"):
            lines.append(WrongLine((command, name, *names[1:], *complete), ("unknown", "cannot show")))
    return lines


def wrong_lines() -> list[WrongLine]:
    """All of them, in an order that is the same in every run."""
    lines = []
    for command, complete in COMPLETE.items():
        start, parser = command.split(), parser_of(command)
        lines += other_lines(start, complete)
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                lines += lines_of_flag(action, start, complete)
    lines += [WrongLine((word,), ("unknown command",)) for word in ("trian", "", " ", "[/b]", "--verson", "x" * 5000)]
    random.Random(0).shuffle(lines)
    return lines


def check_refused(line: WrongLine, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Run a wrong command line in this process, in an empty working folder; it must be refused properly."""

    def too_slow(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    started = time.perf_counter()
    try:
        code = main(list(line.arguments))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    seconds, shown = time.perf_counter() - started, capsys.readouterr()
    assert code == 2, shown.err
    assert seconds < SECONDS
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) <= MAX_ERROR_LINES
    assert "Traceback" not in shown.err
    assert shown.err.replace("\n", "").isprintable()
    assert len(shown.err) < 4000
    assert any(name in shown.err for name in line.named), f"{shown.err} names none of {line.named}"
    assert list(folder.iterdir()) == []
