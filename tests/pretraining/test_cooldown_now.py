"""A finished encoder of a run under way, or of one that was stopped, without a change to the run."""

import os
import platform
import shutil
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import forked
import pytest
from support import TINY_FIELDS, assert_same_bits, metrics, mistake

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.weights import load_encoder
from dmjd.model import MaskedImageModel
from dmjd.runs import branches
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import RunFolder

WSD = {"schedule": "wsd", "warmup_steps": 3, "num_workers": 0, "batch_size": 8, "flip": False}


def config_of(data, out, **fields) -> PretrainConfig:
    return recipes.folder(data, str(out), **TINY_FIELDS | WSD | {"steps": 20} | fields)


def send_at(step: int, number: signal.Signals):
    def send(report):
        if report.state.step == step:
            os.kill(os.getpid(), number)

    return send


def content_of(run: Path) -> dict[Path, bytes]:
    """The files of a run besides its lock and branches."""
    files = (file for file in run.rglob("*") if file.is_file() and file.name != ".lock")
    return {file: file.read_bytes() for file in files if "branches" not in file.relative_to(run).parts}


@pytest.fixture(scope="module")
def straight(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert dmjd.pretrain(config_of(image_folder, out)).finished
    return out


@pytest.fixture(scope="module")
def stopped(image_folder, tmp_path_factory):
    """A run that was stopped after step 6."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert dmjd.pretrain(config_of(image_folder, out), hooks=[send_at(5, signal.SIGTERM)]).step == 6
    return out


def test_a_run_under_way_makes_a_branch_and_goes_on_as_if_nothing_had_happened(image_folder, straight, tmp_path):
    out = tmp_path / "run"
    labels = {"labels": "folder", "test_data": image_folder, "final_eval": True}
    result = dmjd.pretrain(config_of(image_folder, out, **labels), hooks=[send_at(12, signal.SIGUSR1)])
    assert result.finished
    assert_same_bits(out, straight)
    branch = out / "branches" / "step-12"
    assert sorted(file.name for file in (branch / "evaluation").glob("*.json")) == sorted(
        file.name for file in (out / "evaluation").glob("*.json")
    )
    assert [file.name for file in (branch / "checkpoints").iterdir()] == ["final.safetensors"]
    stored = PretrainConfig.from_json((branch / "config.json").read_text())
    assert (stored.steps, stored.cooldown) == (22, 10 / 22)
    lines = metrics(branch)
    assert lines[:12] == metrics(out)[:12]
    peak = lines[11]["lr"]
    assert [line["lr"] / peak for line in lines[12:]] == pytest.approx([1 - (n / 10) ** 0.5 for n in range(10)])
    alone = tmp_path / "alone"
    assert dmjd.pretrain(stored.replace(out=str(alone), final_eval=False)).finished
    assert_same_bits(branch, alone)


class Own(MaskedImageModel):
    """A user's own class."""


@pytest.mark.slow
def test_the_branch_of_a_users_own_model_is_a_copy(image_folder, straight, tmp_path):
    config = config_of(image_folder, tmp_path / "run", num_workers=1)
    model = build_model(config)
    model.__class__ = Own
    assert dmjd.pretrain(config, model=model, hooks=[send_at(9, signal.SIGUSR1)]).finished
    assert_same_bits(tmp_path / "run", straight)
    load_encoder(tmp_path / "run" / "branches" / "step-9")


def test_a_stopped_run_is_branched_from_its_newest_checkpoint(image_folder, stopped, straight, tmp_path):
    shutil.copytree(stopped, out := tmp_path / "run")
    (out / "report.html").write_text("of the run")
    before = content_of(out)
    result = dmjd.pretrain(PretrainConfig(out=str(out), cooldown_now=True))
    assert not (result.path / "report.html").exists()
    assert (result.path, result.step, result.finished) == (out / "branches" / "step-6", 16, True)
    assert content_of(out) == before
    made = content_of(result.path)
    whole = config_of(image_folder, out, cooldown_now=True)
    again = dmjd.pretrain(whole)  # the same command as the run's, and the branch is there already
    assert again.path == result.path
    assert {f: c for f, c in content_of(result.path).items() if f.suffix == ".safetensors"} == {
        f: c for f, c in made.items() if f.suffix == ".safetensors"
    }
    with pytest.raises(ValueError, match=r"holds a run with other settings.*\n  seed: 0 -> 1"):
        dmjd.pretrain(whole.replace(seed=1))
    assert dmjd.pretrain(config_of(image_folder, out)).finished
    assert_same_bits(out, straight)


@pytest.mark.slow
def test_a_signal_in_a_branch_stops_branch_and_run(image_folder, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(branches, "FEWEST_STEPS", 90)
    config, branch = config_of(image_folder, tmp_path / "run"), tmp_path / "run" / "branches" / "step-9"

    def stop_the_branch() -> None:
        while not any(line["step"] > 12 for line in metrics(branch)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_the_branch)
    thread.start()
    result = dmjd.pretrain(config, hooks=[send_at(9, signal.SIGUSR1)])
    thread.join()
    assert (result.step, result.finished) == (10, False)
    stored = PretrainConfig.from_json((branch / "config.json").read_text())
    assert dmjd.pretrain(stored).step == stored.steps == 99
    assert dmjd.pretrain(config).finished
    assert_same_bits(tmp_path / "run", straight)


def test_what_goes_wrong_in_a_branch_does_not_end_the_run(image_folder, straight, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "branches").write_text("in the way")
    config = config_of(image_folder, tmp_path / "run")
    assert dmjd.pretrain(config, hooks=[send_at(9, signal.SIGUSR1)]).finished
    assert "warning: no branch, the run goes on: could not write" in capsys.readouterr().err
    assert_same_bits(tmp_path / "run", straight)


def test_a_signal_when_there_can_be_no_branch_is_a_warning(image_folder, tmp_path, capsys):
    config, signals = config_of(image_folder, tmp_path / "run"), [send_at(n, signal.SIGUSR1) for n in (2, 17)]
    assert dmjd.pretrain(config, hooks=signals).finished
    printed = capsys.readouterr().err
    assert "warning: no branch, the run goes on: step 2 belongs to the warm-up of 3 steps" in printed
    assert "warning: no branch, the run goes on: the run is in its own cooldown" in printed
    cosine = config.replace(out=str(tmp_path / "cosine"), schedule="cosine", warmup_steps=None, steps=4)
    assert dmjd.pretrain(cosine, hooks=signals).finished
    assert "warning: no branch, the run goes on: a cosine schedule has no" in capsys.readouterr().err
    assert not [*tmp_path.glob("*/branches")]


def test_asking_for_what_cannot_be(image_folder, straight, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        capsys.readouterr()
        return mistake(capsys, "pretrain", *arguments, "--cooldown-now")

    assert "say where the run is: --out DIR" in refused()
    assert "holds no run; give its folder as --out" in refused("--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert f"is finished: {straight / 'encoder.safetensors'} is its encoder" in refused("--out", straight)
    cosine = config_of(image_folder, tmp_path / "cosine", schedule="cosine", warmup_steps=None)
    dmjd.pretrain(cosine, hooks=[send_at(1, signal.SIGTERM)])
    assert "needs a run with --schedule wsd" in refused("--out", cosine.out)
    early = config_of(image_folder, tmp_path / "early")
    dmjd.pretrain(early, hooks=[send_at(1, signal.SIGTERM)])
    assert "its newest checkpoint, of step 2, belongs to the 3 warm-up steps" in refused("--out", early.out)
    late = config_of(image_folder, tmp_path / "late")
    dmjd.pretrain(late, hooks=[send_at(16, signal.SIGTERM)])
    assert "is in its own cooldown; the same command without" in refused("--out", late.out)


TWO = """
import os, signal, sys
import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.engine.cooldown_signal import SIGNAL
from dmjd.engine.processes import from_first
def ask(report):
    if report.state.step in (2, 9):
        os.kill(os.getpid(), SIGNAL)
config, straight, stopped = PretrainConfig.from_json(sys.argv[1]), *sys.argv[2:]
assert dmjd.pretrain(config, hooks=[ask]).finished
assert dmjd.pretrain(config.replace(out=straight)).finished
result = dmjd.pretrain(PretrainConfig(out=stopped, cooldown_now=True))
assert (str(result.path), result.step) == (stopped + "/branches/step-6", 16), result
try:
    from_first(lambda: 1 / 0)
except (ZeroDivisionError, ValueError) as error:
    print("in all of them:", error, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("strategy", "checkpoints"),
    [
        ("ddp", "full"),
        pytest.param("fsdp", "full", marks=pytest.mark.slow),
        pytest.param("fsdp", "sharded", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_branches(image_folder, stopped, tmp_path, strategy, checkpoints):
    """Of a run under way, which goes on as if nothing had happened, and of one that was stopped."""
    out, straight = tmp_path / "run", tmp_path / "straight"
    shutil.copytree(stopped, copy := tmp_path / "stopped")
    fields = {"strategy": strategy, "checkpoint_type": checkpoints}
    given = (config_of(image_folder, out, **fields).to_json(), straight, copy)
    codes, said = forked.run_two(forked.execute, TWO, *given, logs=tmp_path, seconds=240)
    assert codes == [0, 0], said
    assert said.count("no branch, the run goes on: step 2 belongs to the warm-up of 3 steps") == 1
    assert said.count("the run goes on from step 9") == 1
    assert said.count("in all of them: division by zero") == 2
    for run in (out, straight):
        with closing(RunFolder(run)) as folder:
            folder.join_parts()
    assert_same_bits(out, straight)
    for branch in (out / "branches" / "step-9", copy / "branches" / "step-6"):
        assert [file.name for file in (branch / "checkpoints").glob("*.safetensors")] == ["final.safetensors"]
        load_encoder(branch)


def test_the_command_asks_the_process_that_trains(image_folder, straight, tmp_path, capsys):
    """Here that is this process itself."""
    out = tmp_path / "run"

    def ask(report):
        if report.state.step == 9:
            capsys.readouterr()
            assert main(["pretrain", "--out", str(out), "--cooldown-now"]) == 0
            assert f"asked process {os.getpid()}, which trains in {out}" in capsys.readouterr().err

    assert dmjd.pretrain(config_of(image_folder, out), hooks=[ask]).finished
    assert_same_bits(out, straight)
    assert "the run goes on from step 9" in capsys.readouterr().err
    assert load_encoder(out / "branches" / "step-9").preprocess is not None


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ("{pid} {machine}", "is of a version without --cooldown-now"),
        ("{pid} elsewhere\n1\n", "on elsewhere, .* give the command on that machine"),
    ],
)
def test_a_process_that_cannot_be_asked_is_named(stopped, tmp_path, owner, message):
    shutil.copytree(stopped, out := tmp_path / "run")
    with closing(RunFolder(out)):
        (out / ".lock").write_text(owner.format(pid=os.getpid(), machine=platform.node()))
        with pytest.raises(ValueError, match=message) as error:
            dmjd.pretrain(PretrainConfig(out=str(out), cooldown_now=True))
        assert "\n" not in str(error.value)
