"""Weights in several files: the same tensors as in one, and indexes that are damaged or name other things."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmjd.encoders.sharded import INDEX, read_shards
from dmjd.encoders.sources import read_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_several_files_hold_what_one_holds(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(**SIZES, image_size=32, patch_size=8, decoder_hidden_size=16)
    model = transformers.ViTMAEForPreTraining(config)
    model.decoder.initialize_weights(16)  # as in published files; some versions start with positions of zeros
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="50KB")
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > 2
    one, several = (read_weights(tmp_path / name, decoder=True) for name in ("one", "several"))
    assert several.hash == one.hash
    assert several.decoder.keys() == one.decoder.keys() != set()
    assert all(torch.equal(several.decoder[key], value) for key, value in one.decoder.items())
    assert (several.grid, several.settings, several.decoder_heads) == (one.grid, one.settings, 16)


def make_shards(folder: Path) -> Path:
    """An index of two files with two tensors each."""
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    for file, names in (("1.safetensors", "ab"), ("2.safetensors", "cd")):
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = dict.fromkeys("ab", "1.safetensors") | dict.fromkeys("cd", "2.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return folder / INDEX


def test_the_index_says_which_file_a_tensor_comes_from(tmp_path):
    """Another file may hold a tensor of the same name, and more than the index names."""
    index, first = make_shards(tmp_path), tmp_path / "1.safetensors"
    save_file(load_file(first) | {"c": torch.zeros(5), "e": torch.zeros(1)}, first)
    assert {key: value.tolist() for key, value in read_shards(index).items()} == {
        name: [float(i)] * 2 for i, name in enumerate("abcd")
    }


def test_files_may_be_links(tmp_path):
    """The cache of the hub holds links to files of other folders."""
    index = make_shards(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "2.safetensors").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "2.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    assert set(read_shards(index)) == set("abcd")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("{folder}/1.safetensors", r"/1\.safetensors' is not the name of a \.safetensors file in the same folder"),
        ("../outside.safetensors", r"'\.\./outside\.safetensors' is not the name"),
        ("./1.safetensors", "is not the name"),
        ("..", "is not the name"),
        ("", "'' is not the name"),
        ("weights.bin", r"'weights\.bin' is not the name"),
        ("3.safetensors", r"names '3\.safetensors', which is missing: copy all files of the model"),
        ("3\0.safetensors", r"names '3\\x00\.safetensors', which is missing"),
        ("\ud800.safetensors", r"names '\\ud800\.safetensors', which is missing"),
        ("\n" + "n" * 5000 + ".safetensors", r"names '\\nn+\.\.\. \(5014 characters\)', which is missing"),
        ("2.safetensors", r"2\.safetensors lacks 'a', which model\.safetensors\.index\.json says it holds"),
        ("fifo.safetensors", r"fifo\.safetensors is not a readable safetensors file \(not a regular file\)"),
        ("text.safetensors", r"text\.safetensors is not a readable safetensors file"),
        ("folder.safetensors", r"folder\.safetensors is not a readable safetensors file \(not a regular file\)"),
    ],
)
def test_files_that_cannot_be_read(file, message, tmp_path):
    folder = tmp_path / "model"
    (folder / "folder.safetensors").mkdir(parents=True)
    index = make_shards(folder)
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / "text.safetensors").write_text("not weights")
    os.mkfifo(folder / "fifo.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = file.format(folder=folder)
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as refused:
        read_shards(index)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"weight_map": {"a": "1.safe', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "wrong content"),
        ("{}", "wrong content .*weight_map"),
        ('{"weight_map": {"a": 1}}', "wrong content"),
        ('{"weight_map": ["1.safetensors"]}', "wrong content"),
        ('{"weight_map": {}}', "names no weights"),
        (b'{"\xff": 1}', "not UTF-8 text"),
    ],
)
def test_damaged_indexes(content, message, tmp_path):
    index = make_shards(tmp_path)
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json:? .*{message}") as refused:
        read_shards(index)
    assert "\n" not in str(refused.value)


def test_an_endless_index_is_not_read(tmp_path):
    index = make_shards(tmp_path)
    os.truncate(index, 1 << 40)
    with pytest.raises(ValueError, match="is no index of weights: it has 1099511627776 bytes"):
        read_shards(index)
