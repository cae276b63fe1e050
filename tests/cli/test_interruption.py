"""Signals outside of training."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dmjd.cli.interruption import Interruption
from dmjd.cli.main import main

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_an_exit_code(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption(ends_process=False) as interruption:
        signal.raise_signal(number)
    assert interruption.exit_code == CODES[number]
    assert signal.getsignal(number) == before


def test_a_signal_that_a_destructor_swallows_comes_again():
    class Object:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def delete():
        Object()
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt), Interruption(ends_process=False):
        delete()


@pytest.mark.parametrize(
    ("name", "resumes"), [("pretrain", "; the same command resumes from the last checkpoint"), ("compare", "")]
)
def test_any_error_after_a_signal_is_its_consequence(name, resumes, monkeypatch, capsys):
    """An import of a compiled module that is interrupted may raise nearly everything."""

    def command(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None

    monkeypatch.setitem(main.__globals__["COMMANDS"], name, (command, ""))
    assert main([name]) == 143
    assert capsys.readouterr().err == f"interrupted{resumes}\n"


def test_a_signal_while_an_error_is_reported_changes_nothing(monkeypatch, capsys):
    """A launcher sends SIGTERM to all processes as soon as one of them has failed."""

    class SlowError(ValueError):
        def __str__(self):
            signal.raise_signal(signal.SIGTERM)
            return "the cause"

    def command(arguments):
        raise SlowError

    monkeypatch.setitem(main.__globals__["COMMANDS"], "compare", (command, ""))
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == "error: the cause\n"


IN_EXEC = """
import signal, sys
from dmjd.cli import main as cli
def command(arguments):
    exec("import signal; signal.raise_signal(signal.SIGTERM)")
sys.modules["dmjd.cli.main"].COMMANDS["compare"] = (command, "")
sys.argv[1:] = ["compare"]
sys.exit(cli())
"""


def test_the_exit_code_is_right_if_the_signal_came_in_an_exec(tmp_path):
    """As of a string: when a dataclass is made, in most imports."""
    (tmp_path / "program.py").write_text(IN_EXEC)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "program"], capture_output=True, text=True, env=environment)
    assert done.returncode == 143


WAIT = """
import os, sys, time
from dmjd.cli import main as cli
def command(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("first", flush=True)
        time.sleep(60)
sys.modules["dmjd.cli.main"].COMMANDS["compare"] = (command, "")
sys.argv[1:] = ["compare"]
sys.exit(cli())
"""


def test_a_second_signal_ends_the_process_at_once():
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGTERM)  # the same request
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 143
