"""500 damaged state files: every command that reads one ends with the right result or with an error that names it."""

import shutil
from pathlib import Path
from random import Random

import pytest
from state_files import COMMANDS, DAMAGES, FILES, judge, make_base
from storm.table import record

CASES = 500


def _cases() -> list[tuple[str, str, str]]:
    """Command, file and damage: every pair of file and damage, then random ones."""
    random = Random(0)
    pairs = [(file, damage) for file in FILES for damage in DAMAGES]
    pairs += [random.choice(pairs) for _ in range(CASES - len(pairs))]
    return [(FILES[file][i % len(FILES[file])], file, damage) for i, (file, damage) in enumerate(pairs)]


@pytest.mark.slow
def test_500_damaged_state_files(tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(make_base(work), tmp_path / "base")
    expected = {name: _expected(name, tmp_path / "base", work) for name in COMMANDS}
    lost = []
    cases = _cases()
    for seed, case in enumerate(cases):
        found = judge(tmp_path / "base", work, case, seed, capsys, expected[case[0]])
        if found.problems:
            lost.append((seed, case, found.problems, found.printed[-400:]))
    record("damaged state files", tried=len(cases), lost=len(lost))
    assert not lost, "\n".join(map(str, lost))


def _expected(name: str, base: Path, work: Path):
    """What a command makes on the undamaged folder."""
    shutil.rmtree(work)
    shutil.copytree(base, work)
    assert COMMANDS[name].run(work) == 0
    return COMMANDS[name].outcome(work)
