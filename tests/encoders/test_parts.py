"""Tensors whose parts are in several files: damaged, missing and hostile ones."""

import pytest
import torch

from dmjd.encoders.headers import FORMAT_IN_PARTS
from dmjd.encoders.parts import read_tensors
from dmjd.files import read_digest, write_safetensors

TENSORS = {"model.weight": torch.arange(15.0).reshape(5, 3), "model.bias": torch.arange(2.0)}


def write(folder, contents, **changes):
    """A checkpoint with these parts, and changes of its metadata."""
    (folder / "parts").mkdir(exist_ok=True)
    listed = []
    for number, tensors in enumerate(contents):
        file = folder / "parts" / f"step-1.abc.{number}.safetensors"
        write_safetensors(file, tensors, {})
        listed.append({"file": file.name, "digest": read_digest(file)})
    metadata = {"format": FORMAT_IN_PARTS, "progress": {"step": 1}, "parts": listed} | changes
    write_safetensors(folder / "step-1.safetensors", {}, metadata)
    return folder / "step-1.safetensors"


def pieces(count):
    """The tensors in parts, some of them empty."""
    divided = {name: torch.tensor_split(value, count) for name, value in TENSORS.items()}
    return [{name: values[i] for name, values in divided.items()} for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_they_are_put_together(tmp_path, count):
    parts = pieces(count)
    parts[0]["optimizer.0.step"] = torch.tensor(3.0)  # whole, in one part
    tensors, metadata = read_tensors(write(tmp_path, parts))
    assert metadata["progress"] == {"step": 1}
    assert set(tensors) == {*TENSORS, "optimizer.0.step"}
    assert len(tensors) == 3
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    model = tensors.under("model.")
    assert torch.equal(model["weight"], TENSORS["model.weight"])
    tensors.clear()
    assert not tensors


def test_a_flipped_bit_and_a_missing_part(tmp_path):
    file = write(tmp_path, pieces(2))
    part = tmp_path / "parts" / "step-1.abc.1.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{part} is damaged"):
        read_tensors(file)
    part.unlink()
    with pytest.raises(ValueError, match=f"lacks its part {part}, or may not see it: copy the folder parts"):
        read_tensors(file)
    write_safetensors(part, {"model.bias": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        read_tensors(file)


@pytest.mark.parametrize("name", ["../step-1.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a.pkl", ""])
def test_names_of_other_files(tmp_path, name):
    file = write(tmp_path, [], parts=[{"file": name, "digest": "0"}])
    with pytest.raises(ValueError, match="is not the name of a part"):
        read_tensors(file)


def test_a_part_of_which_nothing_can_be_found_out(tmp_path):
    """The system refuses to look for it, here because of its long name."""
    file = write(tmp_path, [], parts=[{"file": f"{'a' * 300}.safetensors", "digest": "0"}])
    with pytest.raises(ValueError, match="lacks its part"):
        read_tensors(file)


@pytest.mark.parametrize(
    "parts", ["none", [1], [{"file": "a.safetensors"}], {"a": 1}, [], [{"file": 1, "digest": "0"}]]
)
def test_a_damaged_list_of_parts(tmp_path, parts):
    with pytest.raises(ValueError, match=r"step-1.safetensors"):
        read_tensors(write(tmp_path, [], parts=parts))


@pytest.mark.parametrize(
    "others",
    [
        {"model.weight": torch.ones(5, 2)},
        {"model.weight": torch.ones(5, 3, dtype=torch.float16)},
        {"model.weight": torch.tensor(1.0)},
    ],
)
def test_parts_that_do_not_fit_each_other(tmp_path, others):
    with pytest.raises(ValueError, match=r"do not fit each other: 'model\.weight'"):
        read_tensors(write(tmp_path, [TENSORS, others]))


def test_one_value_in_two_parts(tmp_path):
    step = {"optimizer.0.step": torch.tensor(3.0)}
    with pytest.raises(ValueError, match="do not fit each other"):
        read_tensors(write(tmp_path, [step, step]))
