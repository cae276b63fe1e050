"""Checkpoints of which each of two processes writes a part, against those that the first one writes whole."""

import shutil
import sys
from contextlib import closing
from pathlib import Path

import forked
import pytest
import torch
from pretraining.test_sharded import assert_close, command, run_two
from support import metrics

from dmjd.cli.main import main
from dmjd.encoders.sources import read_weights
from dmjd.encoders.weights import load_encoder
from dmjd.runs.build import load_model
from dmjd.runs.checkpoint import RunFolder, load_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no forks")

FSDP = ["--strategy", "fsdp", "--schedule", "wsd", "--warmup-steps", "1", "--cooldown", "0.5", "--eval-every", "0"]
SHARDED = [*FSDP, "--checkpoint-type", "sharded"]
FIRST, STABLE, THIRD, FINAL = "step-000000001", "before-cooldown", "step-000000003", "final"


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory) -> dict[str, Path]:
    """Finished runs of four steps by the type of their checkpoints; the sharded one went on from a full one. To be
    copied."""
    folder = tmp_path_factory.mktemp("runs")
    full, sharded = (folder / kind / "run" for kind in ("full", "sharded"))
    run_two(image_folder, full, *FSDP)
    take_back(full, sharded, FIRST)
    assert "resumed at step 1" in run_two(image_folder, sharded, *SHARDED)
    return {"full": full, "sharded": sharded}


def take_back(run: Path, copy: Path, checkpoint: str) -> None:
    """Copy a run as it was after a checkpoint."""
    shutil.copytree(run, copy)
    for file in (copy / "checkpoints").rglob("*.safetensors"):
        if file.name.partition(".")[0] != checkpoint:
            file.unlink()


def parts(run: Path) -> list[str]:
    """Checkpoint and process of each part."""
    names = [file.name.split(".") for file in (run / "checkpoints" / "parts").iterdir()]
    return sorted(f"{name[0]} {name[2]}" for name in names)


def assert_same_state(run: Path, other: Path, name: str) -> None:
    """Check that a checkpoint of two runs is the same, in whatever files."""
    one, two = (load_checkpoint(path / "checkpoints" / f"{name}.safetensors") for path in (run, other))
    assert set(one.tensors) == set(two.tensors)
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)
    for state in (one.state, two.state):
        del state["config"], state["format"], state["progress"]["seconds"]
        state.pop("parts", None)
    assert one.state == two.state


def test_the_state_is_the_same_in_parts(runs):
    full, sharded = runs["full"], runs["sharded"]
    assert parts(sharded) == sorted(f"{name} {i}-of-2" for name in (STABLE, THIRD, FINAL) for i in (1, 2))
    for name in (STABLE, THIRD, FINAL):
        assert_same_state(full, sharded, name)
    assert (full / "encoder.safetensors").read_bytes() == (sharded / "encoder.safetensors").read_bytes()
    assert [line["loss"] for line in metrics(full)] == [line["loss"] for line in metrics(sharded)]
    sizes = [file.stat().st_size for file in (sharded / "checkpoints" / "parts").glob(f"{FINAL}.*")]
    assert max(sizes) < 0.6 * (full / "checkpoints" / f"{FINAL}.safetensors").stat().st_size


def test_it_can_be_read_as_a_whole(runs, tmp_path):
    """By what reads checkpoints: models, encoders, weights to start from."""
    model, _ = load_model(runs["full"])
    other, _ = load_model(runs["sharded"])
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    third = runs["sharded"] / "checkpoints" / f"{THIRD}.safetensors"
    reference = load_encoder(runs["full"] / "checkpoints" / f"{THIRD}.safetensors").state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in load_encoder(third).state_dict().items())
    assert read_weights(str(third), decoder=True).decoder
    shutil.copytree(runs["sharded"], tmp_path / "run")
    with closing(RunFolder(tmp_path / "run")) as folder:
        folder.join_parts()
    assert parts(tmp_path / "run") == []
    for name in (STABLE, THIRD, FINAL):
        assert_same_state(runs["full"], tmp_path / "run", name)


def test_a_damaged_part_falls_back(runs, image_folder, tmp_path, capsys):
    take_back(runs["sharded"], tmp_path / "run", THIRD)
    for file in (runs["sharded"] / "checkpoints").rglob(f"{STABLE}*"):
        shutil.copy(file, tmp_path / "run" / file.relative_to(runs["sharded"]))
    (damaged,) = (tmp_path / "run" / "checkpoints" / "parts").glob(f"{THIRD}*.2-of-2.*")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert main(command(image_folder, tmp_path / "run", *FSDP)) == 0  # one process
    said = capsys.readouterr().err
    assert f"{damaged} is damaged" in said
    assert "resumed at step 2" in said
    assert parts(tmp_path / "run") == [f"{STABLE} 1-of-2", f"{STABLE} 2-of-2"]  # the others are in one file
    assert_close(runs["full"], tmp_path / "run")


@pytest.mark.slow
def test_killed_while_it_is_written(runs, image_folder, tmp_path):
    """Before one of two parts is there, and when both are, but not what says so; then it goes on in two processes."""
    run = tmp_path / "run"
    take_back(runs["sharded"], run, STABLE)
    arguments = command(image_folder, run, *SHARDED)
    for rank, name in (("1", "2-of-2.safetensors"), ("0", f"{THIRD}.safetensors")):
        codes, said = forked.run_two(forked.rank_killed_before, rank, name, arguments, logs=tmp_path, seconds=240)
        assert codes[int(rank)] == -9, said
        assert codes[1 - int(rank)] not in (0, None), said
        assert not (run / "checkpoints" / f"{THIRD}.safetensors").exists()
        assert set(parts(run)) > {f"{STABLE} 1-of-2", f"{STABLE} 2-of-2"}  # and some of step 3
        load_encoder(run)
    assert "resumed at step 2" in run_two(image_folder, run, *SHARDED)
    assert parts(run) == [f"{name} {i}-of-2" for name in (STABLE, FINAL, THIRD) for i in (1, 2)]
    for name in (THIRD, FINAL):
        assert_same_state(runs["full"], run, name)


@pytest.mark.slow
def test_a_part_that_cannot_be_written(runs, image_folder, tmp_path):
    """Every process says so in one line, and the checkpoint before stays."""
    take_back(runs["full"], tmp_path / "run", STABLE)
    (tmp_path / "run" / "checkpoints" / "parts").write_text("no folder")
    arguments = command(image_folder, tmp_path / "run", *SHARDED)
    codes, said = forked.run_two(main, arguments, logs=tmp_path, seconds=240)
    assert codes == [2, 2], said
    assert "Traceback" not in said
    assert said.count(f"could not write {tmp_path / 'run' / 'checkpoints' / 'parts'}") == 2
    assert not (tmp_path / "run" / "checkpoints" / f"{THIRD}.safetensors").exists()
    load_checkpoint(tmp_path / "run" / "checkpoints" / f"{STABLE}.safetensors")


def test_a_run_is_prolonged_from_parts(runs, image_folder, tmp_path, capsys):
    """The cooldown that it leaves stays as a branch with its parts."""
    shutil.copytree(runs["sharded"], tmp_path / "run")
    flags = [*command(image_folder, tmp_path / "run", *FSDP), "--steps", "6"]
    assert main(flags) == 0
    assert "prolonged from step 2" in capsys.readouterr().err
    branch = tmp_path / "run" / "branches" / "step-2"
    assert parts(branch) == [f"{FINAL} 1-of-2", f"{FINAL} 2-of-2"]
    assert_same_state(runs["full"], branch, FINAL)
    assert parts(tmp_path / "run") == []


def test_a_branch_from_parts(runs, image_folder, tmp_path):
    take_back(runs["sharded"], tmp_path / "run", STABLE)
    flags = [*command(image_folder, tmp_path / "run", *FSDP), "--steps", "40", "--cooldown-now"]
    assert main(flags) == 0
    branch = tmp_path / "run" / "branches" / "step-2"
    load_encoder(branch)
    for run in (tmp_path / "run", branch):
        assert parts(run) == [f"{STABLE} 1-of-2", f"{STABLE} 2-of-2"]


@pytest.mark.slow
def test_parts_go_on_with_another_strategy(runs, image_folder, tmp_path):
    run = tmp_path / "ddp" / "run"
    take_back(runs["sharded"], run, STABLE)
    assert "resumed at step 2" in run_two(image_folder, run, *FSDP, "--strategy", "ddp")
    assert_close(runs["full"], run)
