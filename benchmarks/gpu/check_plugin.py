"""A pytest plugin that writes the outcome of each test as it comes, and leaves out tests that passed before.

``DMJD_CHECK`` is a JSON file: "out", the folder of the record; "code", the hash of the tested code; "passed", the tests
that passed with it on earlier visits; "earlier", those that passed with earlier code.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from record import Record

TEXT = 3000  # characters of a failure's message

_GIVEN: dict[str, Any] = json.loads(Path(os.environ["DMJD_CHECK"]).read_text(encoding="utf-8"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that passed with this code; those that passed with earlier code come last."""
    left_out = [item for item in items if item.nodeid in _GIVEN["passed"]]
    items[:] = [item for item in items if item.nodeid not in _GIVEN["passed"]]
    items.sort(key=lambda item: item.nodeid in _GIVEN["earlier"])
    config.hook.pytest_deselected(items=left_out)


class Recorder:
    """Records the reports of all workers."""

    def __init__(self) -> None:
        self.record = Record("check", Path(_GIVEN["out"]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a test when it ran, or when its setup failed or skipped it."""
        if report.when != "call" and report.outcome == "passed":
            return
        entry: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome != "passed":
            entry["text"] = str(report.longrepr)[-TEXT:]
        self.record.put(report.nodeid, entry | {"code": _GIVEN["code"]})


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that gets the reports, not in its workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
