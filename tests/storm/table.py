"""The table of what the storm tried, survived and lost."""

import json
import os


def record(part: str, tried: int, lost: int) -> None:
    """Append a line to the file that DMJD_STORM_TABLE names, if it is set."""
    if file := os.environ.get("DMJD_STORM_TABLE"):
        with open(file, "a", encoding="utf-8") as table:
            line = {"part": part, "tried": tried, "survived": tried - lost, "lost": lost}
            table.write(json.dumps(line) + "\n")
