"""How every command of ``dmjd`` reads its arguments."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from dmjd.config.fields import value_types
from dmjd.config.pretrain import REPLACED


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


_WIDTH = 88


class Parser(argparse.ArgumentParser):
    """argparse with errors of one kind and a suggestion for misspelt flags."""

    def __init__(self, **kwargs: Any) -> None:
        formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=_WIDTH)  # noqa: E731
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """A mistake of the user, with where to read more."""
        raise ValueError(f"{message}\nsee: {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; unknown flags are an error that suggests the nearest."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            flags = [text for action in self._actions for text in action.option_strings]
            former = flag.removeprefix("--").removeprefix("no-")
            if former in REPLACED:
                self.error(f"setting '{former}' is now {REPLACED[former]}")
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            kind = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {kind} {flag}{hint}")
        return known


def add_run_arguments(parser: Parser, run_help: str) -> None:
    """RUN and ``--data``, as all commands that look at images have them."""
    parser.add_argument("run", metavar="RUN", help=run_help)
    parser.add_argument("--data", metavar="SOURCE", help="images to use (the run's own)")
