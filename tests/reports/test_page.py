"""The files that a page is made of."""

import tomllib

from jinja2 import Environment
from support import ROOT

from dmjd.reports.page import TEMPLATES

FOLDER = ROOT / "src" / "dmjd" / "reports" / TEMPLATES


def test_the_wheel_holds_the_templates():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["dmjd"]
    packed = {file for pattern in patterns for file in (ROOT / "src" / "dmjd").glob(pattern)}
    assert packed >= set(FOLDER.iterdir()) >= {FOLDER / "report.html"}


def test_nothing_but_our_own_files_is_marked_safe():
    source = (FOLDER / "report.html").read_text()
    assert source.count("| safe") == 3  # style, script and plotly
    assert "http" not in source.replace("http-equiv", "")
    assert "http" not in "".join((FOLDER / name).read_text() for name in ("report.css", "report.js"))
    assert Environment().parse(source)
