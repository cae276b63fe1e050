"""Argument parsing for all commands: flags from configuration fields, and short error messages."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from dmjd.config.fields import RENAMED, REPLACED, Config, value_types
from dmjd.text import shortened

WIDTH = 88

MOST_LETTERS = 300  # of an error message

_SIMILAR = 0.65  # of a suggested flag; 1: equal

_EXPONENT = re.compile(r"-(\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3}")  # a negative number


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ValueError instead of exiting, and suggests the nearest flag."""

    def __init__(self, **kwargs: Any) -> None:
        formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=WIDTH)  # noqa: E731
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as ValueError."""
        raise ValueError(f"{shortened(message, MOST_LETTERS)}\nsee: {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Parse the arguments into values by name. Flags made by :func:`add_field` are absent if not given."""
        arguments = [_plain_number(text) for text in arguments]
        self._check_flags(arguments)
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            self._refuse_second_value(arguments, unknown[0])
            self._refuse(unknown[0].split("=")[0])
        for name, value in vars(known).items():
            self._refuse_empty(name, value)
        return vars(known)

    def _check_flags(self, arguments: Sequence[str]) -> None:
        """Refuse unknown flags before a required one is missed."""
        names = {text for action in self._actions for text in action.option_strings}
        flags = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        if unknown := next((flag for flag in flags if flag not in names), None):
            self._refuse(unknown)
        # Elsewhere the last value counts, so that a command line can be extended; two sets are meant to be both used.
        if flags.count("--data") > 1 and any("--data" in a.option_strings and a.nargs is None for a in self._actions):
            self.error("--data takes one value here, got several")

    def _refuse_second_value(self, arguments: Sequence[str], unknown: str) -> None:
        """Say which flag takes one value only, if that explains an unknown argument."""
        before = arguments[: arguments.index(unknown)] if unknown in arguments else ()
        if unknown.startswith("-") or len(before) < 2 or not before[-2].startswith("--"):
            return
        for action in self._actions:
            if before[-2] in action.option_strings and action.nargs is None:
                self.error(f"{before[-2]} takes one value here, got also {unknown}")

    def _refuse_empty(self, name: str, value: Any) -> None:
        """An empty text would be the current folder, as a path."""
        values = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not text.strip() for text in values):
            positional = any(action.dest == name and not action.option_strings for action in self._actions)
            self.error(f"{name.rstrip('s').upper() if positional else flag_of(name)} must not be empty")

    def _refuse(self, flag: str) -> NoReturn:
        flags = [text for action in self._actions for text in action.option_strings]
        former = {flag_of(old): flag_of(new) for old, new in RENAMED.items()}
        former |= {f"--no-{old[2:]}": f"--no-{new[2:]}" for old, new in former.items()}
        if former.get(flag) in flags:
            raise ValueError(f"the flag {flag} is now called {former[flag]}")
        if (replaced := flag.removeprefix("--").removeprefix("no-")) in REPLACED:
            raise ValueError(f"the setting {replaced} is now {REPLACED[replaced]}")
        hint = f"; did you mean {near}?" if (near := _nearest(flag, flags)) is not None else ""
        self.error(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}{hint}")


def _plain_number(text: str) -> str:
    """A negative number with an exponent without one, because argparse takes ``-3.4e38`` for a flag."""
    return format(Decimal(text), "f") if _EXPONENT.fullmatch(text) else text


def _nearest(flag: str, flags: Iterable[str]) -> str | None:
    """The flag that was meant, if one is similar or holds the word: dashes in front do not make flags similar."""
    word, names = flag.lstrip("-"), {text.lstrip("-"): text for text in flags if text.startswith("--")}
    near = difflib.get_close_matches(word, names, n=1, cutoff=_SIMILAR)
    near = near or [name for name in names if word in name.split("-")]
    return names[near[0]] if near else None


def flag_of(name: str) -> str:
    """The flag of a setting: ``--mask-ratio`` for ``mask_ratio``."""
    return "--" + name.replace("_", "-")


def add_run_argument(parser: Parser, help_text: str) -> None:
    """Add the argument RUN."""
    parser.add_argument("run", metavar="RUN", help=help_text)


def add_field(group: argparse._ActionsContainer, field: dataclasses.Field[Any], defaults: Config) -> None:
    """Add a flag for a configuration field. If it is not given, it is absent from the result and the default holds."""
    kind, many, _ = value_types(field.type)
    value = getattr(defaults, field.name)
    text = field.metadata["help"].replace("%", "%%")
    common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        common["help"] = text if value else f"off by default: {text}"
        group.add_argument(flag_of(field.name), action=argparse.BooleanOptionalAction, **common)
        return
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    common["help"] = text if value is None else f"{text} ({shown})"
    choices = field.metadata["choices"]
    common["metavar"] = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
    if many:
        common["nargs"] = "+"
        common["action"] = "extend" if kind is str else "store"  # names may come one by one: --baseline A --baseline B
    group.add_argument(flag_of(field.name), type=kind, **common)
