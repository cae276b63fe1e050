"""Folders of encoders: what they hold, how they load, what of a folder they leave alone."""

import json
import re
import shutil
from pathlib import Path

import forked
import pytest
import torch
from safetensors import safe_open

from dmjd.cli.main import main
from dmjd.encoders.folders import is_edited, signed_card
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.sources import read_weights
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import load_encoder
from dmjd.images.preprocess import Preprocess

FORMER = Path(__file__).parents[1] / "golden" / "run_v0.1"

FAMILIES = [
    ("vit_tiny_patch8", {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": True}),
    ("conv_vit_tiny_patch8", {"embed_dims": (8, 8, 16), "depths": (1, 1, 1), "num_heads": 2}),
]


def encoder_of(name="vit_tiny_patch8", **options):
    torch.manual_seed(0)
    encoder = create_encoder(name, (16, 24), **(options or FAMILIES[0][1])).eval()
    encoder.preprocess = Preprocess((16, 24))
    return encoder


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_a_folder_is_the_encoder(name, options, tmp_path):
    encoder = encoder_of(name, **options)
    encoder.save_pretrained(tmp_path / "new" / "folder")
    again = load_encoder(tmp_path / "new" / "folder")
    assert encoder_bytes(again) == encoder_bytes(encoder)
    files = {file.name: file.read_bytes() for file in (tmp_path / "new" / "folder").iterdir()}
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    again.save_pretrained(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == files
    weights = read_weights(tmp_path / "again")  # --init
    assert all(torch.equal(weights.tensors[key], value) for key, value in encoder.state_dict().items())


def test_a_damaged_weight_is_noticed(tmp_path):
    encoder_of().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        load_encoder(tmp_path)


def test_what_is_in_a_folder_is_kept(tmp_path):
    encoder = encoder_of()
    (tmp_path / "notes.txt").write_text("mine")
    encoder.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    with torch.no_grad():
        encoder.norm.weight.add_(1)
    (tmp_path / "README.md").write_text(card + "\nMine.\n")
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == card + "\nMine.\n"
    assert encoder_bytes(load_encoder(tmp_path)) == encoder_bytes(encoder)


KILLED = """
import os, sys
import dmjd.encoders.folders as folders
from dmjd import create_encoder
write = folders.write_bytes
def write_one(path, content):
    write(path, content)
    os._exit(9)
folders.write_bytes = write_one
create_encoder("vit_tiny_patch8", 16, embed_dim=16, depth=1, num_heads=2).save_pretrained(sys.argv[1])
"""


def test_a_folder_that_a_kill_left_unfinished_is_written_again(tmp_path):
    assert forked.run(forked.execute, KILLED, tmp_path / "a", log=tmp_path / "log", seconds=120) == 9
    assert len(list((tmp_path / "a").iterdir())) == 1
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_encoder(tmp_path / "a")
    encoder_of().save_pretrained(tmp_path / "a")
    load_encoder(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_files_of_other_programs_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds a {name} that is not of an exported encoder"):
        encoder_of().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_run_is_not_a_folder_to_write_to(tmp_path, capsys):
    shutil.copytree(FORMER, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", "hub", "--out", str(tmp_path / "run")]) == 2
    assert "holds a config.json" in capsys.readouterr().err


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/x", ""):
        with pytest.raises(ValueError, match="folder"):
            encoder_of().save_pretrained(place)


def test_the_card_and_the_config_tell_what_the_run_tells(tmp_path):
    encoder = load_encoder(FORMER)
    encoder.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())["dmjd"]["training"]
    assert (facts["recipe"], facts["data"], facts["steps"]) == ("digits", "digits", 4)
    knn = json.loads((FORMER / "evaluation" / "knn.json").read_text())
    assert facts["evaluations"]["knn"]["scores"]["result"] == knn["result"]["top1"]
    assert facts["evaluations"]["knn"]["scores"]["raw_pixels"] == knn["raw_pixels"]["top1"]
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| `")]
    scores = [f"{100 * knn[part]['top1']:.1f}" for part in ("result", "random_init", "raw_pixels")]
    assert rows[0] == f"| `knn` | `top1` | `digits` | {' | '.join(scores)} |"
    assert rows[1] == "| `linear` |  |  | not evaluated | not evaluated | not evaluated |"
    assert rows[2].startswith("| `finetune` | `top1` |")
    assert rows[2].endswith("| not evaluated |")  # of raw pixels

    load_encoder(tmp_path).save_pretrained(tmp_path / "again")  # the facts travel with the folder
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dmjd"]["training"] == facts


def test_a_shared_encoder_is_evaluated_and_embedded_as_an_encoder_file_is(tmp_path, capsys):
    encoder = encoder_of("vit_tiny_patch8", embed_dim=16, depth=1, num_heads=2)
    encoder.save_pretrained(tmp_path / "shared")
    shared = str(tmp_path / "shared")
    assert main(["embed", shared, "--out", str(tmp_path / "f.npy"), "--device", "cpu"]) == 2
    assert "so it has no data of its own: pass --data" in capsys.readouterr().err
    few = ["--data", "digits", "--test-data", "digits", "--labels-per-class", "2", "--device", "cpu"]
    assert main(["evaluate", "knn", shared, *few, "--num-workers", "0"]) == 0
    load_encoder(shared).save_pretrained(shared)  # the card of what was evaluated meanwhile
    assert re.search(r"`knn` \| `top1` \| `digits` (\| [\d.]+ ){3}", (tmp_path / "shared" / "README.md").read_text())


def test_scores_of_other_weights_are_left_out(tmp_path):
    encoder = load_encoder(FORMER)
    with torch.no_grad():
        encoder.norm.weight.add_(1)
    encoder.save_pretrained(tmp_path / "a")
    assert "| `knn` |  |  | not evaluated" in (tmp_path / "a" / "README.md").read_text()

    load_encoder(FORMER).save_pretrained(tmp_path / "b")
    encoder = load_encoder(tmp_path / "b")
    with torch.no_grad():
        encoder.norm.weight.add_(1)
    encoder.save_pretrained(tmp_path / "c")
    card = (tmp_path / "c" / "README.md").read_text()
    assert "| `knn` |  |  | not evaluated" in card
    assert "The weights were changed after that training." in card


@pytest.mark.parametrize("edit", [lambda t: t.replace(b"A", b"B"), lambda t: t + b"x", lambda t: t[:-10]])
def test_an_edit_of_a_card_is_seen(edit):
    card = signed_card("A card\n\nof two lines")
    assert not is_edited(card)
    assert not is_edited(card.replace(b"\n", b"\r\n"))
    assert is_edited(edit(card))
    assert is_edited(b"\xff")
