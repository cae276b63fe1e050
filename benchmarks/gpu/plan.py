"""What to run first with so many minutes of GPU time. Imports the standard library only."""

import json
from pathlib import Path
from typing import NamedTuple

COMMAND_SECONDS = 540  # a command ends within ten minutes, with installation

OVERTIME = 15  # seconds by which a part may exceed its time

START_SECONDS = 45  # to get a machine and send the tree; 30 were seen

LEAST_MINUTES = 4  # with less, no machine is started

CLOSE_SECONDS = 30  # to fetch the results

PARTS = ("check", "speed", "loader", "similarity", "study")


class Need(NamedTuple):
    """Seconds of a part: less than ``least`` is not worth a start; ``useful`` is what it takes to finish."""

    least: int
    useful: int


# In the order of importance: speed of wrong code is worth nothing. The study takes what is left.
NEEDS = {
    "check": Need(60, 150),
    "speed": Need(60, 200),
    "loader": Need(30, 40),
    "similarity": Need(15, 45),
    "study": Need(200, COMMAND_SECONDS),
}


def is_complete(part: str, results: Path) -> bool:
    """Whether the results of earlier visits contain all of a part."""
    file = results / f"{part}.json"
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("complete"))


def allot(seconds: int, parts: list[str]) -> dict[str, int]:
    """Seconds for each part that is worth a start; the study takes what is left over."""
    given: dict[str, int] = {}
    for part in parts:
        if seconds >= NEEDS[part].least:
            given[part] = min(seconds, NEEDS[part].useful)
            seconds -= given[part]
    return given


def calls(minutes: float, results: Path) -> list[dict[str, int]]:
    """The commands to run with so many minutes, one after the other on one machine: part -> seconds."""
    left = int(60 * minutes) - START_SECONDS if minutes >= LEAST_MINUTES else 0
    missing = [part for part in PARTS if not is_complete(part, results)]
    commands = []
    while missing:
        given = allot(min(COMMAND_SECONDS, left - CLOSE_SECONDS) - OVERTIME * len(missing), missing)
        if not given:
            break
        commands.append(given)
        left -= sum(given.values()) + OVERTIME * len(given) + CLOSE_SECONDS
        missing = [part for part in missing if part not in given]
    return commands


def command_line(given: dict[str, int]) -> str:
    """The call of ``run.py``."""
    return "python3 benchmarks/gpu/run.py " + " ".join(f"{part}={seconds}" for part, seconds in given.items())


def first_call(minutes: float, results: Path) -> str:
    """What to run, as text; with 0 minutes, only what is missing."""
    missing = [part for part in PARTS if not is_complete(part, results)]
    if not missing:
        return "everything is measured"
    if not minutes:
        return f"not complete: {', '.join(missing)}"
    lines = [command_line(given) for given in calls(minutes, results)]
    if not lines:
        return f"{minutes:g} minutes are too few to start a machine; not complete: {', '.join(missing)}"
    return "\n".join([f"with {minutes:g} minutes:", *lines])
