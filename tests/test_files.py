"""Files: atomic writes, and safetensors with JSON metadata."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dmjd.files import (
    METADATA_KEY,
    atomic,
    lists_to_tuples,
    read_safetensors,
    safetensors_bytes,
    tuples_to_lists,
    write_bytes,
    write_safetensors,
    write_text,
)

TENSORS = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
METADATA = {"name": "x", "options": {"sizes": [1, 2], "text": "é"}}


def test_safetensors_round_trip(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, TENSORS, METADATA)
    tensors, metadata = read_safetensors(file)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[key]) and value.dtype == TENSORS[key].dtype for key, value in tensors.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata().keys() == {METADATA_KEY}
        assert json.loads(opened.metadata()[METADATA_KEY]).items() > METADATA.items()


def test_equal_content_is_equal_bytes(tmp_path):
    content = safetensors_bytes(TENSORS, METADATA)
    assert content == safetensors_bytes(dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    write_safetensors(tmp_path / "a.safetensors", TENSORS, METADATA)
    assert (tmp_path / "a.safetensors").read_bytes() == content


def test_a_file_of_another_library_has_no_metadata(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert read_safetensors(tmp_path / "a.safetensors")[1] == {}


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = safetensors_bytes(TENSORS, METADATA)
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not weights, but a text of some length")
    save_file({"a": torch.zeros(1)}, tmp_path / "header.safetensors", {METADATA_KEY: "{"})
    for name in ("cut", "empty", "text", "header", "missing"):
        file = tmp_path / f"{name}.safetensors"
        with pytest.raises(ValueError, match=r"is not a readable checkpoint \(.*\); it may be cut short") as caught:
            read_safetensors(file, kind="checkpoint")
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "é")

    def fail(error: Exception) -> None:
        with atomic(file) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    assert file.read_text(encoding="utf-8") == "é"
    with pytest.raises(ValueError, match=r"could not write .*a\.txt: no space\. What was saved before is untouched"):
        fail(OSError("no space"))
    with pytest.raises(ValueError, match=r"could not write .*nowhere"):
        write_bytes(tmp_path / "nowhere" / "a.bin", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new"


def test_tuples_are_lists_in_json():
    values = {"size": (3, 4), "name": "x", "none": None}
    assert lists_to_tuples(json.loads(json.dumps(tuples_to_lists(values)))) == values
