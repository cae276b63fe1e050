"""Code blocks of README and docs that are marked ``<!-- run -->`` are executed, page by page, in order."""

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT

from dmjd.cli.main import main

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?P<marks>(?:<!-- (?:run|given)[^>]*-->\n)+)```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (?P<word>run|given) ?(?P<rest>.*?) ?-->")


@dataclass(frozen=True)
class Block:
    """A marked code block."""

    language: str
    code: str
    run: bool
    slow: bool
    flags: tuple[str, ...]  # added to its ``dmjd pretrain`` commands
    given: tuple[str, ...]  # what must exist before it runs


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        marks = [(mark["word"], mark["rest"]) for mark in MARK.finditer(match["marks"])]
        runs = [rest for word, rest in marks if word == "run"]
        given = tuple(name for word, rest in marks if word == "given" for name in rest.split())
        flags = tuple(shlex.split(runs[0].removeprefix("with "))) if runs and runs[0].startswith("with ") else ()
        found.append(Block(match["language"], match["code"], bool(runs), runs == ["slow"], flags, given))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, split into words; comments and line continuations as in a shell."""
    lines = code.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def provide(name: str, folder: Path, first_run: Path) -> None:
    """Put the files that a page starts from into its folder."""
    path = folder / name
    if path.exists():
        return
    rng = np.random.default_rng(0)
    if name == "runs/first":
        shutil.copytree(first_run, path)
    elif path.suffix:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    else:
        path.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path / f"{i}.png")


def execute(block: Block, names: dict[str, object]) -> None:
    if block.language == "python":
        exec(compile(block.code, "<page>", "exec"), names)
        return
    for words in commands(block.code):
        if words[0] == "dmjd":
            words = [os.path.expanduser(word) for word in words[1:]]
            assert main([*words, *block.flags] if words[0] == "pretrain" else words) == 0, words
        else:
            subprocess.run(words, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_page(page: Path, folder: Path, first_run: Path, slow: bool) -> None:
    names: dict[str, object] = {}
    with contextlib.chdir(folder):
        for block in blocks(page):
            for name in block.given:
                provide(name, folder, first_run)
            if block.run and (slow or not block.slow):
                execute(block, names)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """The result of ``dmjd pretrain digits --out runs/first``, after a few steps instead of minutes."""
    folder = tmp_path_factory.mktemp("first") / "runs" / "first"
    flags = "--steps 3 --batch-size 8 --eval-every 0 --no-final-eval --device cpu --num-workers 0"
    assert main(["pretrain", "digits", "--out", str(folder), *flags.split()]) == 0
    return folder


@functools.cache
def marked_pages(slow: bool) -> list[Path]:
    return [page for page in PAGES if any(block.run and block.slow == slow for block in blocks(page))]


@pytest.mark.parametrize("page", marked_pages(slow=False), ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page, tmp_path, first_run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_page(page, tmp_path, first_run, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", marked_pages(slow=True), ids=lambda page: page.stem)
def test_all_blocks_of_a_page_run(page, tmp_path, first_run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run_page(page, tmp_path, first_run, slow=True)


def test_every_command_of_the_pages_parses():
    """Blocks that take too long to run must still use flags that exist."""
    unknown = []
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            for words in commands(code) if language == "" else []:
                if words[0] in ("dmjd", "torchrun", "srun"):
                    unknown += [f"{page.name}: {' '.join(words)}: {flag}" for flag in unknown_flags(words)]
    assert not unknown, "\n".join(unknown)


@functools.cache
def help_of(*command: str) -> str:
    result = io.StringIO()
    with contextlib.redirect_stdout(result):
        assert main([*command, "--help"]) == 0
    return result.getvalue()


def unknown_flags(words: list[str]) -> list[str]:
    """Flags of a ``dmjd`` command that its help does not list."""
    words = words[words.index("dmjd") + 1 :]
    if words[0] not in ("pretrain", "bench", "show", "embed", "export", "compare", "evaluate", "inspect"):
        return []
    text = help_of(*words[: 2 if words[0] == "evaluate" else 1])
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
