"""Every wrong command line that the parsers allow to make is refused at once, with a short message."""

import pytest
from storm.table import record
from wrong_command_lines import check_refused, wrong_lines

import dmjd.evaluation.run
import dmjd.figures.show
import dmjd.interop.embed
import dmjd.interop.export
import dmjd.pretraining.bench  # noqa: F401, these are slow to import, which is not part of a command's time

LEAST = 300


@pytest.mark.slow
def test_every_wrong_command_line_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, failures = wrong_lines(), []
    for line in lines:
        try:
            check_refused(line, tmp_path, capsys)
        except (Exception, SystemExit) as error:
            failures.append(f"dmjd {' '.join(map(repr, line.arguments))[:200]}: {type(error).__name__} {error}"[:600])
    record("wrong command lines", tried=len(lines), lost=len(failures))
    assert len(lines) >= LEAST
    assert not failures, f"{len(failures)} of {len(lines)}:\n" + "\n".join(failures[:40])
