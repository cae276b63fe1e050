"""Facts that a release states in several places agree."""

import re
import subprocess

import pytest
from support import ROOT

import dmjd


def test_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == dmjd.__version__
    assert f"## {dmjd.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_keeps_the_lines_that_ci_reads():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert "pip install -e . && dmjd pretrain digits --out runs/first" in lines
    assert "pip install -e '.[dev]' && pytest" in lines


def test_links_of_the_root_files_lead_somewhere():
    """MkDocs checks the pages of docs/; this covers the Markdown files in the root."""
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{page.name}: {link}"


def test_ci_script_is_valid_shell():
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


@pytest.mark.slow
def test_documentation_builds_strictly(tmp_path):
    subprocess.run(["mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, check=True)
