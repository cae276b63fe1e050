"""The command line."""

from dmjd.cli.main import main

__all__ = ["main"]
