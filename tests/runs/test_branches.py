"""Leaving a cooldown loses nothing, wherever it is interrupted."""

import json
import shutil
from pathlib import Path

import pytest
from support import TINY_FIELDS

import dmjd
from dmjd.config import recipes
from dmjd.evaluation.results import write_result
from dmjd.runs import branches
from dmjd.runs.branches import abandoned_cooldown, leave_cooldown

FIELDS = TINY_FIELDS | {"schedule": "wsd", "warmup_steps": 1, "num_workers": 0, "batch_size": 8, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """A finished run of 10 steps with two results, of which one is that of its encoder."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = recipes.folder(image_folder, str(out), **FIELDS, steps=10)
    dmjd.pretrain(config)
    headers, _ = branches.read_headers(out / "checkpoints")
    for task, encoder in (("knn", headers[0].metadata["weights"]), ("linear", "another")):
        write_result(out, task, {"result": {"top1": 0.5}, "encoder": encoder})
    return config


def content_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def left(run: Path, config) -> dict[str, bytes]:
    """What a run holds after its cooldown was left."""
    stable = abandoned_cooldown(run, config)
    if stable is not None:
        leave_cooldown(run, stable, lambda text: None)
    return content_of(run)


def test_the_run_is_as_before_its_cooldown_and_the_branch_has_everything(finished, tmp_path):
    shutil.copytree(finished.out, run := tmp_path / "run")
    before, after = content_of(run), left(run, finished.replace(steps=20))
    gone = {name for name in before if name not in after}
    assert gone == {
        "checkpoints/final.safetensors",
        "checkpoints/step-000000009.safetensors",
        "evaluation/knn.json",
        "figures/curves.png",
        "figures/final.png",
    }
    branch = {name.removeprefix("branches/step-8/"): after[name] for name in after if name.startswith("branches/")}
    for name, content in before.items():
        if not (
            name.startswith(("checkpoints/step-", "checkpoints/before-")) or name == "config.json" or "events" in name
        ):
            assert branch[name] == content, name
    assert [name for name in branch if name.startswith("checkpoints/")] == ["checkpoints/final.safetensors"]
    assert json.loads(branch["config.json"])["steps"] == 10
    assert json.loads(branch["config.json"])["out"] == str(run / "branches" / "step-8")
    assert abandoned_cooldown(run, finished.replace(steps=20)) is None


@pytest.mark.parametrize("name", ["_link", "write_text", "move", "remove"])
def test_an_interruption_at_any_time_is_made_up_for(finished, tmp_path, monkeypatch, name):
    shutil.copytree(finished.out, straight := tmp_path / "run")
    config, wanted = finished.replace(steps=20), left(straight, finished.replace(steps=20))
    original, interruptions = getattr(branches, name), 0
    for number in range(100):
        shutil.rmtree(straight)
        shutil.copytree(finished.out, straight)
        calls = iter(range(100))

        def interrupted(*arguments, calls=calls, number=number):
            if next(calls) == number:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(branches, name, interrupted)
        try:
            left(straight, config)
        except KeyboardInterrupt:
            interruptions += 1
        monkeypatch.setattr(branches, name, original)
        assert left(straight, config) == wanted
        if interruptions <= number:
            break
    assert interruptions == number > 0


def test_another_branch_of_the_same_step_stays(finished, tmp_path):
    shutil.copytree(finished.out, run := tmp_path / "run")
    (run / "branches" / "step-8").mkdir(parents=True)
    (run / "branches" / "step-8" / "mine.txt").write_text("x")
    left(run, finished.replace(steps=20))
    assert sorted(path.name for path in (run / "branches").iterdir()) == ["step-8", "step-8-2"]
    assert [path.name for path in (run / "branches" / "step-8").iterdir()] == ["mine.txt"]


def test_links_are_copies_where_a_disk_has_none(finished, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links")

    shutil.copytree(finished.out, run := tmp_path / "run")
    wanted = left(run, finished.replace(steps=20))
    shutil.rmtree(run)
    shutil.copytree(finished.out, run)
    monkeypatch.setattr(branches.os, "link", refuse)
    assert left(run, finished.replace(steps=20)) == wanted
