"""Two processes that hold a part of the model each (``--strategy fsdp``) against two that hold all of it."""

import shutil
import sys

import forked
import pytest
import torch
from pretraining.test_distributed import TOLERANCE, without_key_bias
from safetensors.torch import load_file
from support import TINY, metrics, mistake

from dmjd.cli.main import main
from dmjd.encoders.weights import load_encoder
from dmjd.runs.build import load_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no forks")

FLAGS = [*TINY, "--batch-size", "8", "--steps", "4", "--blr", "0.01", "--clip-grad", "1", "--optimizer", "adamw"]
FLAGS += ["--target", "ema", "--ema-momentum", "0.9", "--drop-path", "0.3", "--num-workers", "0", "--accumulate", "2"]
FLAGS += ["--eval-every", "2", "--checkpoint-every", "1"]


def command(data, out, *flags: object) -> list[str]:
    return [str(word) for word in ("pretrain", "folder", "--data", data, "--out", out, *FLAGS, *flags)]


def run_two(data, out, *flags: object) -> str:
    out.parent.mkdir(exist_ok=True)
    codes, said = forked.run_two(main, command(data, out, *flags), logs=out.parent, seconds=240)
    assert codes == [0, 0], said
    return said


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """Finished runs by strategy: one of copies, and one that went on from its second step with parts."""
    folder = tmp_path_factory.mktemp("runs")
    replicated, sharded = (folder / strategy / "run" for strategy in ("ddp", "fsdp"))
    run_two(image_folder, replicated, "--strategy", "ddp")
    take_back(replicated, sharded, 2)
    said = run_two(image_folder, sharded, "--strategy", "fsdp")
    assert "resumed at step 2" in said
    assert "2 process(es), fsdp: a part of the model in each" in said
    return {"ddp": replicated, "fsdp": sharded}


def take_back(run, copy, step: int) -> None:
    """Copy a run as it was after a step."""
    shutil.copytree(run, copy)
    for file in (copy / "checkpoints").iterdir():
        if file.name != f"step-{step:09d}.safetensors":
            file.unlink()


def assert_close(run, other) -> None:
    one, two = (load_file(path / "checkpoints" / "final.safetensors") for path in (run, other))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(
            without_key_bias(key, two[key]), without_key_bias(key, one[key]), **TOLERANCE, msg=key
        )


def names_in(run) -> set[str]:
    return {str(file.relative_to(run)) for file in run.rglob("*") if "events" not in file.name}


def assert_same(run, other) -> None:
    assert_close(run, other)
    first, second = metrics(run), metrics(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        for name in {"grad_norm", "effective_rank"} & a.keys():  # losses are of the first process's images
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    assert "effective_rank" in first[-1].keys() & second[-1].keys()


def test_sharded_equals_replicated(runs):
    assert_same(runs["ddp"], runs["fsdp"])
    assert names_in(runs["ddp"]) == names_in(runs["fsdp"])
    load_encoder(runs["fsdp"])  # whole, and its digest is right
    load_model(runs["fsdp"])


@pytest.mark.slow
def test_sharded_equals_replicated_from_the_first_step(runs, image_folder, tmp_path):
    run_two(image_folder, tmp_path / "fsdp" / "run", "--strategy", "fsdp")
    assert_same(runs["ddp"], tmp_path / "fsdp" / "run")


@pytest.mark.slow
def test_muon_of_parts(image_folder, tmp_path):
    for strategy in ("ddp", "fsdp"):
        run_two(
            image_folder, tmp_path / strategy / "run", "--strategy", strategy, "--optimizer", "muon", "--steps", "2"
        )
    assert_same(tmp_path / "ddp" / "run", tmp_path / "fsdp" / "run")


def test_a_run_of_parts_goes_on_in_one_process(runs, image_folder, tmp_path, capsys):
    take_back(runs["fsdp"], tmp_path / "run", 3)
    assert main(command(image_folder, tmp_path / "run", "--strategy", "fsdp")) == 0
    said = capsys.readouterr().err
    assert "resumed at step 3" in said
    assert "--strategy fsdp has no effect on one process" in said
    assert_same(runs["ddp"], tmp_path / "run")


def test_what_cannot_be_sharded_is_refused(image_folder, tmp_path, capsys):
    flags = ("--data", image_folder, "--out", tmp_path / "run", "--strategy", "fsdp")
    assert "--strategy fsdp needs --precision bf16" in mistake(capsys, "pretrain", *flags, "--precision", "fp16")
    assert not (tmp_path / "run").exists()
