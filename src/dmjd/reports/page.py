"""The HTML of a report. All names in it are escaped, and nothing in it is loaded from elsewhere."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dmjd.text import printable

MISSING_EXTRA = "a report needs plotly and jinja2: pip install 'dmjd[report]'"

TEMPLATES = "templates"


def check_extra() -> None:
    """Raise ValueError, with the command that installs it, if an optional package is missing."""
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError:
        raise ValueError(MISSING_EXTRA) from None


def render(context: dict[str, Any]) -> str:
    """The page.

    Args:
        context: the variables of ``report.html``; ``data`` is for the script.
    """
    from jinja2 import Environment, StrictUndefined  # an optional package
    from plotly.offline import get_plotlyjs

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_file("report.html"))
    parts = {"style": _file("report.css"), "script": _file("report.js"), "plotly": get_plotlyjs()}
    return page.render(**context | {"data": _clean(context["data"])}, **parts)


@cache
def _file(name: str) -> str:
    return (resources.files(__package__) / TEMPLATES / name).read_text(encoding="utf-8")


def _printable(value: Any) -> Any:
    """Show control characters of a text as escapes; markup (which is escaped already) stays as it is."""
    if isinstance(value, Path):
        value = str(value)
    if type(value) is not str or (value.isascii() and value.isprintable()):  # the latter is fast, for large data
        return value
    return printable(value, keep="\n")


def _clean(value: Any) -> Any:
    """Show control characters in all texts of JSON types as escapes."""
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return [_clean(one) for one in value] if isinstance(value, list | tuple) else value
