"""The command line: help, suggestions, a short message for each user error, and all commands in sequence."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import TINY, dmjd, mistake
from wrong_command_lines import check_refused, wrong_lines

from dmjd.cli.main import main
from dmjd.figures.kinds import KINDS


def test_help_is_quick_and_ends_with_an_example():
    code = """
import contextlib, io, sys
from dmjd.cli.main import COMMANDS, main
for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(arguments) == 0
    assert text.getvalue().splitlines()[-1].strip().startswith(("dmjd", "torchrun")), arguments
print([name for name in ("torch", "numpy", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    started = time.perf_counter()
    assert dmjd("--help").stdout.splitlines()[-1].strip().startswith("dmjd pretrain")
    assert time.perf_counter() - started < 5  # it should take one, but an import of torch takes more


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (["pretrain"], "--max-bad", "--max-unreadable"),
        (["evaluate", "segmentation", "run"], "--looks", "--num-evals"),
        (["evaluate", "segmentation", "run"], "--no-colours", "--no-color-jitter"),
        (["evaluate", "detection", "run"], "--no-outlines", "--no-instance-masks"),
        (["evaluate", "detection", "run"], "--pictures", "--num-images"),
        (["show", "masks", "run"], "--pictures", "--num-images"),
    ],
)
def test_a_flag_of_a_former_version_names_the_new_one(capsys, command, old, new):
    for arguments in ([old, 3], [f"{old}=3"]):
        assert mistake(capsys, *command, *arguments) == f"error: the flag {old} is now called {new}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["pretrain", "digit"], "did you mean 'digits'"),
        (["pretrain", "--mask-ration", "0.5"], "did you mean --mask-ratio?"),
        (["pretrain", "digits", "--mask-ratio", "1.0"], "--mask-ratio must lie between 0 and 1"),
        (["pretrain", "digits", "--mask-ratio", "-1"], "--mask-ratio"),
        (["pretrain", "digits", "--mask-ratio", "nan"], "--mask-ratio"),
        (["pretrain", "digits", "--mask-ratio", "much"], "invalid float value: 'much'"),
        (["pretrain", "digits", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["pretrain", "digits", "--in-chans", "0"], "--in-chans must be at least 1"),
        (["pretrain", "--data", "x"], "--out DIR"),
        (["pretrain"], "--data FOLDER"),
        (["evaluate", "kn", "x"], "did you mean 'knn'"),
        (["show", "mask", "x"], "did you mean 'masks'"),
        (["show", "neighbours", "x"], "did you mean 'neighbors'"),
        (["embed", "x"], "required: --out"),
        (["export", "x", "--format", "tim", "--out", "x"], "did you mean 'timm'"),
        (["compare"], "required: RUN"),
        (["evaluate", "knn", "x", "--data", "a", "b"], "--data takes one value here, got also b"),
        (["embed", "x", "--out", "f.npy", "--data", "a", "b"], "--data takes one value here, got also b"),
        (["show", "masks", "x", "--data", "a", "--data", "b:0.3"], "--data takes one value here, got several"),
        (["report", "x", "--data", "a", "--seed", "1", "b"], "--seed takes one value here, got also b"),
        (["export", "x", "--formt", "timm"], "did you mean --format?"),
    ],
)
def test_user_errors_found_before_torch_is_imported(capsys, arguments, message):
    assert message in mistake(capsys, *arguments)


@pytest.mark.parametrize(
    ("command", "flag", "near"),
    [
        (["pretrain"], "--mask-ration", "--mask-ratio"),
        (["pretrain"], "--batch", "--batch-size"),
        (["pretrain"], "--lr", "--blr"),
        (["pretrain"], "--size", "--img-size"),
        (["embed", "x"], "--workers", "--num-workers"),
        (["embed", "x"], "--init", None),  # the dashes made --split similar
        (["evaluate", "finetune", "x"], "--init", None),
        (["show", "masks", "x"], "--minutes", None),
    ],
)
def test_only_flags_of_a_similar_meaning_are_suggested(capsys, command, flag, near):
    hint = f"; did you mean {near}?" if near else ""
    assert mistake(capsys, *command, flag, "3").splitlines()[0] == f"error: unknown flag {flag}{hint}"


def test_help_leads_to_the_defaults_of_the_recipe_for_own_images(capsys):
    """README recommends it; the help without a recipe shows those of another."""
    pointer = "dmjd pretrain folder --help"
    assert pointer in run_command(capsys, "--help")
    assert pointer in " ".join(run_command(capsys, "pretrain", "--help").split())
    text = " ".join(run_command(capsys, "pretrain", "folder", "--help").split())
    assert "those of 'folder':" in text
    assert "(vit_tiny_patch16)" in text


def test_each_form_of_the_sweep_names_the_other(capsys):
    assert "(or linear --sweep)" in run_command(capsys, "evaluate", "--help")
    assert "linear_sweep" in run_command(capsys, "evaluate", "linear", "--help")
    assert "linear --sweep" in run_command(capsys, "evaluate", "linear_sweep", "--help")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder", "vit_tinny_patch8"], "did you mean 'vit_tiny_patch8'"),
        (["--img-size", "30"], "not divisible by the encoder's 8-pixel patch"),
        (["--target", "hogg"], "did you mean 'hog'"),
        (["--block-size", "3"], "does not divide the 4 x 4 token grid"),
        (["--pred-ratio", "0.3"], r"--pred-ratio must lie in [0.5, 1]"),
        (["--mask-ratio", "0.99"], "leaves none of the 16 masking units visible"),
        (["--hog-cell", "3"], "--hog-cell 3 does not divide"),
        (["--device", "cuda:9"], "device must be one of auto, cpu, cuda"),
        (["--precision", "fp16"], "fp16 needs a CUDA device"),
        (["--depth", "1", "2", "3"], "takes 1 number(s)"),
    ],
)
def test_user_errors_found_while_building(capsys, tmp_path, flags, message):
    cpu = [] if "--device" in flags else ["--device", "cpu"]
    arguments = ["pretrain", "digits", "--out", tmp_path / "run", *cpu, *flags]
    assert message in mistake(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_data_without_images(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.jpg").write_text("x")
    common = ["--out", tmp_path / "run", *TINY, "--steps", 1]
    assert "no images" in mistake(capsys, "pretrain", "folder", "--data", tmp_path / "empty", *common)
    error = mistake(capsys, "pretrain", "folder", "--data", tmp_path / "emty", *common)
    assert "empty" in error
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def as_somebody() -> Iterator[None]:
    """Drop root's permission to read everything, if the tests run as root."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_a_folder_without_permission(capsys):
    for name in (
        "pretraining.run",
        "data.sources.registry",
        "data.train_loader",
    ):  # while the interpreter's own files can be read
        importlib.import_module(f"dmjd.{name}")
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        data = Path(root) / "closed"
        data.mkdir(mode=0)
        with as_somebody():
            error = mistake(capsys, "pretrain", "folder", "--data", data, "--out", Path(root) / "run", *TINY)
        assert "no permission" in error
        assert str(data) in error
        data.chmod(0o755)


def test_folders_that_are_not_runs(capsys, tmp_path):
    assert "is not a run folder" in mistake(capsys, "evaluate", "knn", tmp_path / "nothing", "--data", "digits")
    assert "is not a run folder" in mistake(capsys, "evaluate", "knn", tmp_path)
    assert mistake(capsys, "show", "masks", tmp_path, "--out", tmp_path / "x.png")
    (tmp_path / "file").write_text("x")
    assert "is a file" in mistake(capsys, "pretrain", "digits", "--out", tmp_path / "file", *TINY, "--steps", 1)


def run_command(capsys, *arguments: object) -> str:
    """Run a command in this process; returns its stdout."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_all_commands_in_sequence(tmp_path, image_folder, capsys):
    """Folder -> encoder -> evaluation with folder labels -> figures, features, exported file."""
    run = tmp_path / "run"
    run_command(
        capsys, "pretrain", "folder", "--data", image_folder, "--out", run, *TINY, "--steps", 3, "--batch-size", 8
    )
    sets = ["--data", image_folder, "--test-data", image_folder, "--labels", "folder", "--device", "cpu"]
    table = run_command(capsys, "evaluate", "knn", run, *sets)
    assert "random initialization" in table
    assert (run / "evaluation" / "knn.json").exists()
    assert "linear_sweep" in run_command(capsys, "evaluate", "linear", run, *sets, "--sweep", "--steps", 2)
    assert (run / "evaluation" / "linear_sweep.json").exists()
    for kind in KINDS:
        run_command(capsys, "show", kind, run, "--out", tmp_path / f"{kind}.png", "--num-images", 2)
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert "knn" in run_command(capsys, "compare", run, run, "--out", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    features = run_command(capsys, "embed", run, "--out", tmp_path / "features.npy", "--half").strip()
    assert np.load(features).shape == (24, 32)
    usage = run_command(capsys, "export", run, "--format", "timm", "--out", tmp_path / "vit.safetensors")
    found: dict = {}
    exec(usage.partition("Load it with:")[2].strip(), found)
    assert found["model"].num_features == 32
    run_command(capsys, "export", run, "--format", "hub", "--out", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    for row in (f"data | `{image_folder.name}`", "number of images | 24", "recipe | `folder`", "duration | 3 steps, 1"):
        assert f"| {row}" in card
    assert str(image_folder.parent) not in card
    scores = re.escape(f"`knn` | `top1` | `{image_folder.name}` ") + r"(\| [\d.]+ ){3}\|"
    assert re.search(scores, card)
    cats = image_folder / "cats"
    mistake(capsys, "evaluate", "knn", run, "--data", cats, "--test-data", cats, "--labels", "folder")


def test_wrong_command_lines_are_refused_at_once(tmp_path, capsys, monkeypatch):
    """A part of them; tests/storm tries them all."""
    monkeypatch.chdir(tmp_path)
    for line in wrong_lines()[:150]:
        check_refused(line, tmp_path, capsys)
