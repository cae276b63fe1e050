"""``metrics.jsonl`` after kills and full disks."""

import json

import pytest

from dmjd.runs.checkpoint import RunFolder
from dmjd.runs.metrics import cut_metrics, read_metrics

WRONG = ['{"step": 3, "lo', "[1]", '{"step": "x"}', '{"loss": 1.0}', "[" * 100_000, '{"step": true}', "3", ""]


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    file.write_bytes("\n".join([*good[:3], *WRONG, *good[3:]]).encode() + b"\n\xff\xfe\n" + b'{"step": 6')
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3, 4, 5]
    assert cut_metrics(file, 4) == len(WRONG)  # the empty line is none; the last one was cut short by a kill
    assert file.read_text() == "".join(f"{line}\n" for line in good[:4])
    before = file.stat().st_mtime_ns
    assert cut_metrics(file, 4) == 0
    assert file.stat().st_mtime_ns == before
    assert cut_metrics(tmp_path / "missing", 0) == 0


def test_a_line_that_cannot_be_written_is_written_with_the_next(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    folder.metrics.rename(tmp_path / "away")
    folder.metrics.mkdir()
    with pytest.raises(ValueError, match=r"could not write .*metrics\.jsonl"):
        folder.log({"step": 2})
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read: it is a folder, not a file; move it away"):
        folder.cut_metrics(1)
    folder.metrics.rmdir()
    (tmp_path / "away").rename(folder.metrics)
    folder.log({"step": 3})
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1, 2, 3]
    folder.close()
