"""Two processes (gloo) against one: same images, same gradients, same weights after several steps."""

import json
import os
import shutil
import socket
import subprocess
import sys

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import TINY

from dmjd.cli.main import main
from dmjd.runs.checkpoint import load_checkpoint

TOLERANCE = {"rtol": 1e-3, "atol": 2e-6}


def without_key_bias(name: str, value: torch.Tensor) -> torch.Tensor:
    """Attention does not depend on the bias of its keys: its gradient is rounding error, which Adam amplifies."""
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


def torchrun(processes: int, *arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", "-m", "dmjd"]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("accumulate", "target", "workers"), [(1, "hog", 1), pytest.param(2, "ema", 0, marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(tmp_path, image_folder, accumulate, target, workers):
    common = ["pretrain", "folder", "--data", image_folder, *TINY, "--steps", 5, "--batch-size", 8, "--num-views", 2]
    # Muon orthogonalizes in bf16, which amplifies the last bits of a sum, so only gradients are compared.
    common += ["--target", target, "--ema-momentum", 0.9, "--optimizer", "adamw"]
    common += ["--blr", 0.01, "--checkpoint-every", 2, "--drop-path", 0.3]
    assert main([str(a) for a in (*common, "--num-workers", 0, "--out", tmp_path / "one")]) == 0
    own = ["--num-workers", workers, "--accumulate", accumulate, "--out", tmp_path / "two"]
    if workers:  # as torchrun starts them, without importing everything three times
        codes, said = forked.run_two(main, [str(word) for word in (*common, *own)], logs=tmp_path, seconds=240)
        assert codes == [0, 0], said
    else:
        torchrun(2, *common, *own)
    one, two = (load_file(tmp_path / name / "checkpoints" / "final.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(
            without_key_bias(key, two[key]), without_key_bias(key, one[key]), **TOLERANCE, msg=key
        )
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(first, second, strict=True):
        for name in ("grad_norm", "loss", "mim", "vis"):  # losses too are those of all images
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
        assert b["epoch"] == a["epoch"]


def test_unreadable_images_of_all_processes_count_together(tmp_path, image_folder):
    """Each process reads a part of the images only, and all end together, with one message."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(image_folder, data)
    damaged = sorted(data.rglob("*.png"))[::5][:4]
    for file in damaged:
        file.write_bytes(b"no image")
    common = ["pretrain", "folder", "--data", data, "--out", run, *TINY, "--batch-size", 8, "--num-workers", 0]
    command = [str(word) for word in (*common, "--steps", 9, "--max-unreadable", 3)]
    codes, said = forked.run_two(main, command, logs=tmp_path, seconds=240)
    assert codes == [2, 2], said
    assert f"4 of {len(list(data.rglob('*.png')))} images can't be read, more than --max-unreadable = 3" in said
    assert "process 2 of 2: error: 4 of" in said
    assert "lost process" not in said
    assert all(said.count(f"replaced by another image: {file}:") == 1 for file in damaged)
    state = load_checkpoint(next(run.glob("checkpoints/step-*"))).state
    assert {name for name, _ in state["bad"]} == set(map(str, damaged))


def test_an_error_of_the_first_process_at_the_start(tmp_path, image_folder):
    """It alone looks at the run folder; the other one is not a bug to be reported."""
    run = tmp_path / "run"
    (run / "encoder.safetensors").mkdir(parents=True)
    common = ["pretrain", "folder", "--data", image_folder, "--out", run, *TINY, "--batch-size", 8, "--num-workers", 0]
    codes, said = forked.run_two(main, [str(word) for word in common], logs=tmp_path, seconds=240)
    assert codes == [2, 2], said
    assert "encoder.safetensors: it is a folder, not a file" in said
    assert "process 2 of 2: error: lost process 1 of 2 (rank 0" in said


@pytest.mark.parametrize("differs", ["out", "data"])
def test_machines_without_shared_files_are_an_error(tmp_path, image_folder, differs):
    """The second process would begin from random weights, or see other images, without a word."""
    flags = [*map(str, TINY), "--batch-size", "8", "--device", "cpu", "--num-workers", "0", "--held-out", "0"]
    run, other = tmp_path / "run", tmp_path / "other"
    if differs == "out":
        assert main(["pretrain", "folder", "--data", str(image_folder), "--out", str(run), *flags, "--steps", "2"]) == 0
        expected = "starts at step 0, the first one starts at step 2"
    else:
        shutil.copytree(image_folder, other)
        next(other.rglob("*.png")).unlink()
        expected = "process 2 of 2 sees 23 images"
    own = ({"out": str(run), "data": str(image_folder)}, {differs: str(other)}, [*flags, "--steps", "4"])
    codes, said = forked.run_two(forked.as_second, *own, logs=tmp_path, seconds=120)
    assert codes == [2, 2]
    assert expected in said


def test_two_processes_find_the_same_new_images(tmp_path):
    """As many as one does, and without waiting for each other, although they see them at different positions."""
    rng = np.random.default_rng(0)

    def add(folder, numbers):
        folder.mkdir(exist_ok=True)
        for i in numbers:
            Image.fromarray(rng.integers(0, 256, (40 + i % 3, 36, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")

    add(tmp_path / "set", range(9))
    common = [
        "pretrain",
        "folder",
        "--data",
        tmp_path / "set",
        *TINY,
        "--batch-size",
        6,
        "--held-out",
        0,
        "--blr",
        0.01,
    ]
    common += ["--optimizer", "adamw", "--data-may-grow", "--num-workers"]
    assert main([str(a) for a in (*common, 0, "--steps", 2, "--out", tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    add(tmp_path / "set", range(9, 14))
    assert main([str(a) for a in (*common, 0, "--steps", 7, "--out", tmp_path / "one")]) == 0
    command = [str(word) for word in (*common, 1, "--steps", 7, "--out", tmp_path / "two")]
    codes, said = forked.run_two(main, command, logs=tmp_path, seconds=240)
    assert codes == [0, 0], said
    # One process ends in epoch 2; with workers the next one has been looked at.
    records = [(tmp_path / name / "joined.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert records[1][: len(records[0])] == records[0]
    assert json.loads(records[0][1])["paths"] == [f"{i:02d}.png" for i in range(9, 14)]
    one, two = (load_file(tmp_path / name / "checkpoints" / "final.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(
            without_key_bias(key, two[key]), without_key_bias(key, one[key]), **TOLERANCE, msg=key
        )
