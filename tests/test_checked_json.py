"""JSON of damaged or edited files: right values, or one error that names the file."""

import math
from dataclasses import dataclass

import pytest

from dmjd.checked_json import parse_json, read_json


@dataclass
class Progress:
    step: int
    seconds: float = 0.0
    name: str | None = None


def test_content_of_the_right_types():
    assert parse_json('{"step": 3, "seconds": 1, "other": []}', Progress, "x") == Progress(3, 1.0)
    assert parse_json(b'{"a": ["b"]}', dict[str, list[str]], "x") == {"a": ["b"]}
    assert math.isnan(parse_json('{"step": 1, "seconds": NaN}', Progress, "x").seconds)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ('{"step": 1', "not valid JSON"),
        (b'{"step": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"step": ' + "[" * 900 + "]" * 900 + "}", "wrong content"),
        ("1" * 10_000, "not valid JSON"),
        ("[1]", "wrong content"),
        ('{"seconds": 1}', "step"),
        ('{"step": "1"}', r"\$\.step"),
        ('{"step": true}', r"\$\.step"),
        ('{"step": 1.5}', r"\$\.step"),
        ('{"step": 1, "seconds": null}', r"\$\.seconds"),
    ],
)
def test_wrong_content_is_one_line_that_names_the_file(tmp_path, text, says):
    file = tmp_path / "state.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says) as caught:
        read_json(file, Progress)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path, Progress)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json", Progress)
