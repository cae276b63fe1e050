"""The project uses the field's words, and none of its own former words for the same things."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# former word (a regular expression) -> what to write instead
FORMER = {
    r"pictures?": "image",
    r"hidden (token|place|position)s?": "masked token",
    r"(images|pictures) a second": "images/s",
    r"share of the (run|machine's own)": "progress; MFU",
    r"asked for by|is asked for": "target, requested",
    r"verdicts?": "final evaluation",
    r"painters?|glow": "renderer, heat map",
    r"bad (pictures?|images?)|bad_files|max.bad|num.bad": "unreadable image",
    r"outlines?|outlined": "instance masks",
    r"greet(s|ed|ing)?|settle[sd]?": "log a summary, validate",
    r"mend(s|ed|ing)?": "fix",
    r"made anew|anew": "recompute",
    r"kept_or_again": "maybe_checkpoint",
    r"few_labels|FewLabels": "low-shot",
    r"colou?red? jitter|colours?|coloured": "color",
    r"gr(ey)": "gray",
    r"centres?|centred": "center",
    r"neighbours?": "neighbor",
    r"(un|de)?normalis\w+|visualis\w+|initialis\w+|summaris\w+": "-ize",
    r"learnt": "learned",
    r"labelled|unlabelled|modelling": "labeled, unlabeled, modeling",
    r"behaviours?": "behavior",
}
# Lines that name a former word on purpose: tables of renamed settings and their messages.
EXEMPT_LINES = re.compile(r"former|renamed|now called|does not take|version 0\.1|did you mean|_bad=", re.IGNORECASE)
# Former settings and file keys as quoted words or flags; "picture" is also a column name in other people's tables.
FORMER_NAMES = re.compile(r"""(?<=["'-])(max.bad|(num_)?pictures?|looks|colours|outlines?|neighbours)(?=["' ])""")
EXEMPT_FILES = {"tests/test_vocabulary.py", "CHANGELOG.md"}


@functools.cache
def tracked() -> dict[Path, str]:
    """Texts without the former names that may stay."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files is git's")
    files = (ROOT / name for name in listed.stdout.splitlines() if name not in EXEMPT_FILES)
    kept = [file for file in files if file.suffix in (".py", ".md", ".toml", ".yml", ".cff") and file.exists()]
    return {file: FORMER_NAMES.sub("", file.read_text(encoding="utf-8")) for file in kept}


@pytest.mark.parametrize("word", FORMER)
def test_no_former_word_is_left(word):
    pattern = re.compile(rf"(?<![a-z]){word}(?![a-z])", re.IGNORECASE)
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file, text in tracked().items()
        if pattern.search(text)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line) and not EXEMPT_LINES.search(line)
    ]
    assert not found, f"write {FORMER[word]} instead of {word}:\n" + "\n".join(found[:20])
