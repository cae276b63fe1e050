"""Checkpoints and run folders: full disks, truncated files, foreign files, pickles with code, locks."""

import json
import pickle
import time
from pathlib import Path

import forked
import pytest
import torch

from dmjd.config import recipes
from dmjd.files import write_text
from dmjd.runs.build import read_config
from dmjd.runs.checkpoint import RunFolder, load_checkpoint, save_checkpoint

STATE = {"progress": {"step": 3, "images": 12, "seconds": 1.0}}


def test_round_trip(tmp_path):
    tensors = {"model.a": torch.randn(3, 4), "optimizer.0.step": torch.tensor(3.0)}
    save_checkpoint(tmp_path / "c.safetensors", tensors, STATE)
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert loaded.state["progress"] == STATE["progress"]
    assert torch.equal(loaded.part("model")["a"], tensors["model.a"])
    assert torch.equal(loaded.part("optimizer")["0.step"], tensors["optimizer.0.step"])


def test_a_full_disk_keeps_the_previous_file(tmp_path):
    """A file-size limit makes the kernel refuse the write, like a full disk."""
    save_checkpoint(tmp_path / "c.safetensors", {"model.a": torch.zeros(4)}, STATE)
    before = (tmp_path / "c.safetensors").read_bytes()
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from dmjd.runs.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save_checkpoint(Path({str(tmp_path)!r}) / "c.safetensors", {{"model.a": torch.ones(100000)}}, {STATE!r})
except ValueError as error:
    print(error, file=sys.stderr)
"""
    assert forked.run(forked.execute, code, log=tmp_path / "log", seconds=120) == 0
    assert "What was saved before is untouched" in (tmp_path / "log").read_text()
    assert (tmp_path / "c.safetensors").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"c.safetensors", "log"}


@pytest.mark.parametrize("cut", [0, 5, 200])
def test_a_truncated_checkpoint_is_reported(tmp_path, cut):
    file = tmp_path / "c.safetensors"
    save_checkpoint(file, {"model.a": torch.randn(100)}, STATE)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(file)


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_code_in_a_pickle_is_not_run(tmp_path):
    file, trace = tmp_path / "step-000000001.safetensors", tmp_path / "ran"
    file.write_bytes(pickle.dumps(_Trap(str(trace))))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(file)
    assert not trace.exists()


def test_retention_and_newest(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for step in (2, 4, 10):
        folder.save(step, {"model.a": torch.zeros(1)}, {"progress": {"step": step}})
    assert [p.name for p in folder.files()] == ["step-000000004.safetensors", "step-000000010.safetensors"]
    folder.files()[-1].write_bytes(b"cut")
    newest, problems = folder.newest()
    assert newest is not None
    assert newest.state["progress"]["step"] == 4
    assert len(problems) == 1
    folder.files()[0].write_bytes(b"cut")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        folder.newest()
    folder.close()


def test_a_second_owner_is_refused(tmp_path):
    first = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="another process is training"):
        RunFolder(tmp_path)
    first.close()
    RunFolder(tmp_path).close()


def test_validate_config_refuses_other_settings_and_shows_them(tmp_path):
    folder = RunFolder(tmp_path)
    config = recipes.digits(out=str(tmp_path), steps=5)
    folder.validate_config(config)
    folder.validate_config(config.replace(steps=9))
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        folder.validate_config(config.replace(steps=9, seed=1))
    with pytest.raises(ValueError, match="--no-resume"):
        folder.validate_config(config.replace(steps=9, resume=False))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a run's configuration"):
        folder.validate_config(config)
    folder.close()


def test_metrics_are_cut_back(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(5):
        folder.log({"step": step, "loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    folder.cut_metrics(2)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [0, 1, 2]
    folder.close()


def test_a_file_where_the_folder_should_be(tmp_path):
    write_text(tmp_path / "f", "x")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "f")


def test_the_lock_of_a_killed_owner_is_waited_for(tmp_path):
    """Its worker processes inherit the lock and end a little later."""
    program = """
import os, sys, time
from dmjd.runs.checkpoint import RunFolder
folder = RunFolder(sys.argv[1])
if os.fork() == 0:
    time.sleep(1.5)
os._exit(0)
"""
    assert forked.run(forked.execute, program, tmp_path / "run", log=tmp_path / "log", seconds=120) == 0
    started = time.monotonic()
    RunFolder(tmp_path / "run").close()
    assert time.monotonic() - started > 0.5


def test_the_lock_of_a_living_owner_is_refused_at_once(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="another process is training"):
        RunFolder(tmp_path)
    folder.close()
    RunFolder(tmp_path).close()


def test_a_damaged_configuration_is_taken_from_the_newest_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    config = recipes.digits(out=str(tmp_path), steps=5)
    folder.validate_config(config)
    folder.save(2, {"model.a": torch.zeros(1)}, STATE | {"config": json.loads(config.to_json())})
    file = tmp_path / "config.json"
    for damage in (
        b"{",
        b"[" * 100_000,
        b"[1]",
        b"\xff",
        b'{"format": 1, "seed": "x"}',
        b'{"format": 1, "blr": 1%s}' % (b"0" * 400),
    ):
        file.write_bytes(damage)
        with pytest.warns(UserWarning, match=r"config\.json.*taken from .*step-000000002\.safetensors"):
            assert read_config(tmp_path) == config
    file.unlink()
    with pytest.warns(UserWarning, match=r"config\.json is missing"):
        folder.validate_config(config)
    assert read_config(tmp_path) == config
    file.write_text("{")
    with pytest.warns(UserWarning, match="taken from"), pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        folder.validate_config(config.replace(seed=1))
    folder.close()


@pytest.mark.parametrize(
    "progress", [3, {"step": "3"}, {"images": 3}, {"step": 3, "seconds": "x"}, None, {"step": [3]}]
)
def test_a_checkpoint_with_other_types_is_skipped(tmp_path, progress):
    folder = RunFolder(tmp_path)
    folder.save(2, {"model.a": torch.zeros(1)}, STATE | {"progress": {"step": 2}})
    folder.save(4, {"model.a": torch.zeros(1)}, {"progress": progress})
    newest, problems = folder.newest()
    assert newest is not None
    assert newest.state["progress"]["step"] == 2
    assert len(problems) == 1
    assert "step-000000004.safetensors" in problems[0]
    folder.close()


def test_a_flipped_bit_in_the_newest_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 4):
        file = folder.save(step, {"model.a": torch.zeros(100)}, {"progress": {"step": step}})
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)
    newest, problems = folder.newest()
    assert newest is not None
    assert newest.state["progress"]["step"] == 2
    assert ["step-000000004.safetensors is damaged" in problem for problem in problems] == [True]
    folder.close()


def test_the_newest_checkpoint_is_that_of_the_last_step(tmp_path):
    """A final checkpoint is older than those of steps after the duration was extended."""
    folder = RunFolder(tmp_path)
    folder.save(3, {"model.a": torch.zeros(1)}, {"progress": {"step": 3}}, final=True)
    folder.save(4, {"model.a": torch.zeros(1)}, {"progress": {"step": 4}})
    folder.save(6, {"model.a": torch.zeros(1)}, {"progress": {"step": 6}})
    folder.files()[0].write_bytes(b"cut")
    newest, problems = folder.newest()
    assert newest is not None
    assert newest.state["progress"]["step"] == 6
    assert problems == []
    (folder.checkpoints / "step-000000008.safetensors").mkdir()
    assert folder.newest()[0].state["progress"]["step"] == 6
    folder.save(10, {"model.a": torch.zeros(1)}, {"progress": {"step": 10}})
    folder.close()


def test_what_a_kill_left_is_deleted_at_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    left = [
        tmp_path / ".encoder.safetensors.a_b1c2d3.tmp",
        tmp_path / "checkpoints" / ".final.safetensors.00000000.tmp",
    ]
    kept = [tmp_path / ".notes.tmp", tmp_path / "checkpoints" / "final.tmp"]
    for file in left + kept:
        file.write_text("x")
    RunFolder(tmp_path, owner=False)
    assert all(file.exists() for file in left)
    RunFolder(tmp_path).close()
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in kept)


@pytest.mark.parametrize(
    "preprocess", [None, 3, {"img_size": [8, 8]}, {"img_size": [8, 8], "in_chans": 3, "mean": [], "std": []}]
)
def test_damaged_preprocessing_is_named(tmp_path, preprocess):
    state = STATE | {"encoder": {"preprocess": preprocess}}
    save_checkpoint(tmp_path / "c.safetensors", {"model.a": torch.zeros(1)}, state)
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        load_checkpoint(tmp_path / "c.safetensors").preprocess()
