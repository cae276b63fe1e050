"""What is said about an earlier training that is not continued."""

import json

import pytest

from dmjd.config.dense import DetectionConfig, SegmentationConfig
from dmjd.config.finetune import FinetuneConfig
from dmjd.evaluation.supervised.dense_task import NOT_IN_RESULT
from dmjd.evaluation.supervised.similar import find_similar

IDENTITIES = {
    "finetune": FinetuneConfig().resolve(500, (32, 32), 192).identity(),
    "segmentation": {k: v for k, v in SegmentationConfig().to_dict().items() if k not in NOT_IN_RESULT},
    "detection": {k: v for k, v in DetectionConfig().to_dict().items() if k not in NOT_IN_RESULT},
}


def identity(task: str = "finetune", data: str = "a", **changes) -> dict:
    return {"init": "result", "encoder": "e", "data": data, "configuration": IDENTITIES[task] | changes}


def make(folder, description: dict, *, finished: bool = False, checkpoint: bool = True) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": {"steps": 3}} | description))
    if checkpoint:
        (folder / "checkpoints" / "step-000000001.safetensors").touch()
    if finished:
        (folder / "result.json").touch()


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, values in IDENTITIES.items() for name in values])
def test_every_setting_is_named_with_both_values(tmp_path, task, name):
    old = IDENTITIES[task][name]
    new = not old if isinstance(old, bool) else [9] if isinstance(old, list) else 9
    make(tmp_path / "pre-trained-seed0-1", identity(task))
    found = find_similar(tmp_path / "pre-trained-seed0-2", identity(task, **{name: new}))
    assert found == (
        f"it differs from the unfinished one in {tmp_path / 'pre-trained-seed0-1'}, which is kept: "
        f"{name}: {old} -> {new}"
    )


def test_which_trainings_are_mentioned(tmp_path):
    new = tmp_path / "pre-trained-seed0-new"
    make(tmp_path / "from-scratch-seed0-1", identity(epochs=1))
    make(tmp_path / "pre-trained-seed10-1", identity(epochs=1))
    make(tmp_path / "pre-trained-seed0-empty", identity(epochs=1), checkpoint=False)
    make(tmp_path / "pre-trained-seed0-done", identity(epochs=1), finished=True)
    (tmp_path / "pre-trained-seed0-damaged").mkdir()
    (tmp_path / "pre-trained-seed0-damaged" / "config.json").write_text("{")
    assert find_similar(new, identity()) is None
    make(tmp_path / "pre-trained-seed0-other", identity(data="b"), finished=True)
    assert "finished one in" in find_similar(new, identity())
    assert find_similar(new, identity()).endswith("which is kept: other images or labels")
    make(tmp_path / "pre-trained-seed0-same", identity())
    assert find_similar(new, identity()).endswith("which is kept: it is of another version of dmjd")


def test_many_differences_are_counted(tmp_path):
    make(tmp_path / "pre-trained-seed0-1", identity())
    others = identity(epochs=1, blr=2, ema=0.5, erase=0.5, mixup=0.5)
    assert find_similar(tmp_path / "pre-trained-seed0-2", others).endswith("; and 1 more")
