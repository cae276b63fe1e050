"""Which parts of checkpoints are deleted."""

import shutil

import pytest
import torch

from dmjd.files import read_digest, write_safetensors
from dmjd.runs.checkpoint import KEEP, RunFolder, load_checkpoint


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def save(folder, step, token="a1", **names):
    """A checkpoint in one part."""
    name = folder.file(step, **names).stem
    file = folder.checkpoints / "parts" / f"{name}.{token}.1-of-1.safetensors"
    file.parent.mkdir(exist_ok=True)
    write_safetensors(file, {"model.a": torch.tensor([float(step)])}, {})
    listed = [{"file": file.name, "digest": read_digest(file)}]
    return folder.save(step, {}, {"progress": {"step": step}}, parts=listed, **names)


def parts(folder):
    return sorted(file.name.removesuffix(".1-of-1.safetensors") for file in (folder.checkpoints / "parts").iterdir())


def test_parts_are_deleted_with_their_checkpoints(folder):
    for step in range(1, KEEP + 3):
        save(folder, step)
    save(folder, 2, stable=True)
    save(folder, 9, final=True)
    assert parts(folder) == ["before-cooldown.a1", "final.a1", "step-000000003.a1", "step-000000004.a1"]
    save(folder, 4, token="b2")
    assert parts(folder) == ["before-cooldown.a1", "final.a1", "step-000000003.a1", "step-000000004.b2"]
    assert load_checkpoint(folder.files()[-1]).part("model")["a"] == 4


def test_parts_of_a_checkpoint_that_cannot_be_read_stay(folder):
    """It may be readable again: a disk or its permissions may have failed."""
    file = save(folder, 1)
    content = file.read_bytes()
    file.write_bytes(b"")
    (folder.checkpoints / "parts" / "step-000000007.c3.1-of-1.safetensors").touch()  # of a process that was killed
    folder.close()
    RunFolder(folder.path).close()
    assert parts(folder) == ["step-000000001.a1"]
    file.write_bytes(content)
    load_checkpoint(file)


def test_a_copy_of_a_checkpoint_keeps_its_parts(folder):
    copy = folder.checkpoints / "keep.safetensors"
    shutil.copy(save(folder, 1), copy)
    for step in range(2, KEEP + 3):
        save(folder, step)
    folder.join_parts()
    folder.close()
    RunFolder(folder.path).close()
    assert parts(folder) == ["step-000000001.a1"]
    assert load_checkpoint(copy).part("model")["a"] == 1


def test_checkpoints_become_whole(folder):
    folder.save(1, {"model.a": torch.ones(1)}, {"progress": {"step": 1}})
    file = save(folder, 2)
    folder.join_parts()
    assert parts(folder) == []
    loaded = load_checkpoint(file)
    assert loaded.state == {"format": 1, "progress": {"step": 2}}
    assert loaded.tensors["model.a"] == 2


def test_a_damaged_checkpoint_in_parts_falls_back(folder):
    save(folder, 1)
    save(folder, 2)
    (folder.checkpoints / "parts" / "step-000000002.a1.1-of-1.safetensors").unlink()
    checkpoint, problems = folder.newest()
    assert checkpoint is not None
    assert checkpoint.part("model")["a"] == 1
    assert "lacks its part" in problems[0]
