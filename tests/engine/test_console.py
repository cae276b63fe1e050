"""Messages go to stderr, tables to stdout; processes that are not enabled print nothing."""

import io
import os
import pty
import re
import select
import sys
import time
from contextlib import closing, contextmanager

import pytest
from hostile_names import NAMES
from rich.console import Console as RichConsole
from rich.table import Table

import dmjd.engine.console
from dmjd.engine.console import PLAIN_SECONDS, Console, duration_text, literal, tracked
from dmjd.text import printable

SCALARS = {"loss": 0.5, "images_per_s": 12.3, "data_wait": 0.25}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (-1, "0:00:00")])
def test_durations(seconds, text):
    assert duration_text(seconds) == text


def test_messages_and_tables(capsys):
    console = Console()
    console.say("[b]not markup[/b]")
    console.warn("careful")
    table = Table("name")
    table.add_row("value")
    console.table(table)
    printed = capsys.readouterr()
    assert printed.err == "[b]not markup[/b]\nwarning: careful\n"
    assert "value" in printed.out


def test_progress_without_a_terminal_is_an_occasional_line_and_one_at_the_end(capsys):
    console = Console()
    for step in (1, 2, 4):
        console.progress(step / 4, step, step / 2, seconds=step, scalars=SCALARS)
    console.close()
    first, last = capsys.readouterr().err.splitlines()
    assert PLAIN_SECONDS > 1  # so it is too soon for the line of step 2
    assert first == " 25.0 %  left 0:00:03  step 1  epoch 0.5  loss 0.5000  12 images/s  data wait 25 %"
    assert last.startswith("100.0 %  left 0:00:00  step 4  epoch 2.0")


def test_a_short_wait_for_data_is_not_shown(capsys):
    Console().progress(0.5, 1, 1.0, 1.0, SCALARS | {"data_wait": 0.09})
    assert "data wait" not in capsys.readouterr().err


@contextmanager
def terminal(monkeypatch):
    """Context with a terminal of 60 columns as standard error; yields a function that reads what was printed."""
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")

    def read() -> str:
        text = b""
        while select.select([master], [], [], 0)[0]:
            text += os.read(master, 65536)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode())

    with os.fdopen(slave, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield read
    os.close(master)


def wait_for(read, pattern: str, seconds: float = 60.0) -> str:
    """Read until a text was printed that a pattern matches; returns all that was printed."""
    printed, until = "", time.monotonic() + seconds
    while not re.search(pattern, printed) and time.monotonic() < until:
        time.sleep(0.05)
        printed += read()
    assert re.search(pattern, printed), printed
    return printed


def test_a_terminal_shows_what_is_waited_for_and_how_old_its_line_is(monkeypatch):
    monkeypatch.setattr(dmjd.engine.console, "_STALE_SECONDS", 1)
    with terminal(monkeypatch) as read, closing(Console()) as console:
        console.wait("first step ...")
        wait_for(read, r"first step \.\.\.  \(\d+ s ago\)")
        console.progress(0.25, 1, 0.5, 1.0, SCALARS)
        # Cut, with room for the age.
        shown = wait_for(read, r"25.0 %  left 0:00:03  step 1  epoch 0.5  loss \S*…  \(\d s ago\)")
        assert "images/s" not in shown.rpartition("…")[2]
        console.say("a message")
        wait_for(read, "a message")


def test_a_terminal_shows_the_progress_of_what_takes_long(monkeypatch):
    monkeypatch.setattr(dmjd.engine.console, "LIVE_SECONDS", 0.3)
    with terminal(monkeypatch) as read:
        for item in tracked(range(4), "features", 8, lambda item: 2):
            if item == 0:  # the first batch takes long
                wait_for(read, r"features \.\.\.")
            if item == 2:
                wait_for(read, "50.0 %  left 0:00:0.  features: 4 of 8 images")


def test_progress_of_what_takes_long_without_a_terminal(capsys, monkeypatch):
    assert list(tracked(range(4), "features", 4)) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dmjd.engine.console, "LIVE_SECONDS", 0.0)
    monkeypatch.setattr(dmjd.engine.console, "PLAIN_SECONDS", 0.0)
    for _ in tracked(range(2), "linear probe", 2, unit="steps"):
        time.sleep(0.01)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(" 50.0 %  left 0:00:00  linear probe: 1 of 2 steps  ")
    assert last.startswith("100.0 %  left 0:00:00  linear probe: 2 of 2 steps  ")


def test_other_processes_are_silent(capsys):
    console = Console(enabled=False)
    console.say("a")
    console.warn("b")
    console.progress(1.0, 1, 1.0, 1.0, SCALARS)
    console.table(Table("name"))
    assert capsys.readouterr() == ("", "")


def test_streams_that_fail_end_nothing(monkeypatch):
    """A closed pipe, a full disk, a stream that is closed, a terminal that cannot show a letter."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = io.StringIO()
    closed.close()
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115, closing it fails too
    for stream in (os.fdopen(writer, "w", buffering=1), full, closed, narrow, None):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console()
        console.say("é")
        console.warn("\udcff")
        console.progress(1.0, 1, 1.0, 1.0, SCALARS)
        console.table(Table("é"))
        console.close()
    assert narrow.buffer.getvalue().startswith(b"\\xe9\nwarning: \\udcff\n")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(capsys, name):
    """In messages, warnings, live lines and tables: no markup, no emoji codes, no control characters."""
    console = Console()
    console.say(name)
    console.warn(name)
    console.line(name, 1.0)
    console.close()
    printed = capsys.readouterr().err
    assert printed == f"{printable(name, keep=chr(10))}\nwarning: {printable(name, keep=chr(10))}\n" + (
        f"100.0 %  {printable(name)}\n"
    )
    table = Table("name")
    table.add_row(literal(name))
    console.table(table)
    RichConsole(width=500).print(table)  # of a user, who prints a table of ours
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert shown.count(printable(name).replace(" ", "")) >= 2 or name == "a" * 300  # a long name is folded
    assert shown.isprintable()
