"""How every command of ``dmjd`` reads its arguments."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

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
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            kind = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {kind} {flag}{hint}")
        return known


def add_run_arguments(parser: Parser, run_help: str) -> None:
    """RUN and ``--data``, as all commands that look at pictures have them."""
    parser.add_argument("run", metavar="RUN", help=run_help)
    parser.add_argument("--data", metavar="SOURCE", help="pictures to use (the run's own)")
