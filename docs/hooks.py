"""MkDocs hooks: generate pages from the parsers, the public names and the files at the root."""

import contextlib
import importlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "log.md": "LOG.md"}
COMMANDS = ("pretrain", "plan", "bench", "show", "embed", "export", "compare", "report")
MODULES_TO_EXTEND = (
    "dmjd.masking",
    "dmjd.branches",
    "dmjd.model",
    "dmjd.targets.base",
    "dmjd.encoders.base",
    "dmjd.data.sources.base",
    "dmjd.evaluation.registry",
    "dmjd.config.pretrain",
    "dmjd.config.recipes",
)
SHORT_CODE = re.compile(r"<code>(?=[^<\n]{1,28}</code>)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {name: root_page(source) for name, source in ROOT_PAGES.items()}
    pages["command_line.md"] = command_line_page()
    pages["python_api.md"] = public_names_page()
    pages["extending_api.md"] = extending_page()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Link to the generated pages instead of the files at the root, which is what the sources link to."""
    for page, source in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def on_page_content(html: str, **_: object) -> str:
    """Turn Sphinx roles of docstrings into links; keep flags and numbers with their deviation on one line."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        code = f"<code>{target.rpartition('.')[2]}</code>"
        return f'<autoref identifier="{target}" optional>{code}</autoref>' if "." in target else code

    html = SHORT_CODE.sub('<code class="short">', ROLE.sub(link, html))
    return html.replace(" ± ", "&nbsp;±&nbsp;")


def root_page(name: str) -> str:
    """A Markdown file of the root folder, with links relative to docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for page, source in ROOT_PAGES.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text


def help_text(*arguments: str) -> str:
    """The output of ``dmjd ... --help``."""
    from dmjd.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if main([*arguments, "--help"]) != 0:
            raise RuntimeError(f"dmjd {' '.join(arguments)} --help failed")
    return out.getvalue().rstrip()


def command_line_page() -> str:
    """Every command and its help, from the parsers."""
    overview = help_text("evaluate")
    tasks = re.findall(r"^  ([a-z_]+) {2,}\S", overview, re.MULTILINE)
    if not tasks:
        raise RuntimeError("dmjd evaluate --help lists no task")
    lines = ["# Command line", "", "Generated from the parsers: this is the output of `--help`.", ""]
    lines += ["```text", help_text(), "```", ""]
    for command in COMMANDS:
        lines += [f"## dmjd {command}", "", "```text", help_text(command), "```", ""]
    lines += ["## dmjd evaluate", "", "```text", overview, "```", ""]
    for task in tasks:
        lines += [f"### dmjd evaluate {task}", "", "```text", help_text("evaluate", task), "```", ""]
    return "\n".join(lines)


def directive(source: str, title: str, without: Sequence[str] = ()) -> list[str]:
    """The docstrings of an object or module under a title, without private names and those in ``without``."""
    filters = ["!^_[^_]", *(f"!^{name}$" for name in without)]
    options = [f"heading: {title}", f"toc_label: {title}", f"filters: {filters}"]
    return [f"::: {source}", "    options:", *(f"      {option}" for option in options), ""]


def public_names_page() -> str:
    """The public names of ``dmjd``, each from the module that defines it."""
    import dmjd

    lines = ["# Python API", "", "The public names of `dmjd`. They are loaded when first used.", ""]
    modules = []
    for name in sorted(dmjd.__all__, key=str.lower):
        value = getattr(dmjd, name)
        if hasattr(value, "__qualname__"):
            lines += directive(f"{value.__module__}.{value.__qualname__}", f"dmjd.{name}")
        else:
            modules.append(value.__name__)
    lines += ["## Modules", "", ", ".join(f"`{name}`" for name in modules) + ". ", ""]
    lines += directive("dmjd.interop.conversion", "dmjd.interop")
    return "\n".join(lines)


def extending_page() -> str:
    """The modules that extensions build on."""
    import dmjd

    lines = ["# Extending", "", "The modules that extensions build on. [Contributing](contributing.md) describes how."]
    lines += ["The public names of `dmjd` are in [Python API](python_api.md) and not repeated here.", ""]
    for name in MODULES_TO_EXTEND:
        importlib.import_module(name)  # a module that moved fails here, by name
        shown = [public for public in dmjd.__all__ if getattr(getattr(dmjd, public), "__module__", "") == name]
        lines += directive(name, name, without=shown)
    return "\n".join(lines)
