"""The table of evaluations: a new one needs a file and a line, and all that are listed can be loaded."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from support import mistake, tiny_encoder

import dmjd
from dmjd.cli.main import main
from dmjd.config.evaluation import EvaluationConfig
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE
from dmjd.evaluation.frozen.protocol import evaluate_all, task_config
from dmjd.evaluation.registry import TASKS, EvaluationTask, FrozenTask
from dmjd.evaluation.run import evaluate

TOY = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dmjd.config.evaluation import EvaluationConfig
from dmjd.config.fields import option
from dmjd.encoders.weights import load_encoder
from dmjd.evaluation.results import write_result
from dmjd.encoders.registry import fresh_like


@dataclass(frozen=True, kw_only=True)
class ToyConfig(EvaluationConfig):
    """Settings of the toy."""

    task: ClassVar[str] = "toy"

    scale: float = option(1.0, "factor on the score", "task", gt=0)


def toy(run, **options):
    """Size of the first weight matrix."""
    config, encoder = ToyConfig(**options), load_encoder(run)
    scores = [config.scale * e.norm.weight.mean().item() for e in (encoder, fresh_like(encoder, seed=config.seed))]
    result = {"task": "toy", "result": {"top1": scores[0]}, "random_init": {"top1": scores[1]}}
    write_result(Path(config.out or run), "toy", result | {"configuration": config.to_dict()})
    return result
'''

TOY_FROZEN = '''
from dataclasses import dataclass
from typing import ClassVar

from dmjd.config.evaluation import FrozenConfig
from dmjd.config.fields import option


@dataclass(frozen=True, kw_only=True)
class MajorityConfig(FrozenConfig):
    """Settings of the toy."""

    task: ClassVar[str] = "majority"

    add: float = option(0.0, "added to the score", "task", ge=0)


def majority(train, test, *, seed, device, add=MajorityConfig.add):
    """Accuracy of always predicting the most frequent class."""
    return {"top1": add + (test.labels == train.labels.mode().values).float().mean().item()}
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Two evaluations, each with one file and one line."""
    (tmp_path / "toy_file.py").write_text(TOY)
    (tmp_path / "majority_file.py").write_text(TOY_FROZEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(TASKS, "toy", EvaluationTask("toy", "toy_file:ToyConfig", "toy_file:toy", "mean of a weight"))
    line = FrozenTask("majority", "majority_file:MajorityConfig", "majority_file:majority", "the most frequent class")
    monkeypatch.setitem(TASKS, "majority", line)


def test_a_new_evaluation_is_a_file_and_a_line(toys, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / ENCODER_FILE).write_bytes(encoder_bytes(tiny_encoder()))
    assert dmjd.evaluate("toy", run, scale=2)["result"] == {"top1": 2.0}
    assert main(["evaluate", "toy", str(run), "--scale", "3"]) == 0
    assert "toy" in capsys.readouterr().out
    assert json.loads((run / "evaluation" / "toy.json").read_text())["configuration"] == {"scale": 3.0}
    assert main(["evaluate"]) == 0
    assert "  toy           mean of a weight" in capsys.readouterr().out
    assert main(["evaluate", "toy", "--help"]) == 0
    assert "factor on the score (1.0)" in capsys.readouterr().out
    assert "scale must be greater than 0" in mistake(capsys, "evaluate", "toy", run, "--scale", 0)
    assert "did you mean 'toy'" in mistake(capsys, "evaluate", "tooy", run)
    assert "toy" in str(dmjd.compare(run).scores)


def test_a_new_evaluation_of_features_joins_the_pass_over_the_images(toys, run):
    results = evaluate_all({"knn": {}, "majority": {"add": 1}}, run, device="cpu")
    assert results["majority"]["result"] == results["majority"]["raw_pixels"]
    assert 1 <= results["majority"]["result"]["top1"] <= 2
    assert results["majority"]["configuration"] == {"add": 1.0, "precision": "fp32"}
    assert evaluate("majority", run, device="cpu", add=1)["result"] == results["majority"]["result"]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_all_names_in_the_table_exist(task):
    config = task.load_config()
    assert issubclass(config, EvaluationConfig)
    assert config.task == task.name
    assert callable(task.load_run())
    assert all(field.metadata["help"] for field in dataclasses.fields(config))


def test_flags_of_all_tasks_are_known_without_torch():
    code = """
import contextlib, io, sys
from dmjd.cli.main import main
from dmjd.evaluation.registry import TASKS
for arguments in (["evaluate"], *(["evaluate", task, "--help"] for task in (*TASKS, "frozen"))):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(arguments) == 0
    assert text.getvalue().splitlines()[-1].startswith("  dmjd evaluate"), arguments
print([name for name in ("torch", "timm", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shared_settings_are_not_accepted_for_a_single_task():
    with pytest.raises(ValueError, match="seed is shared by all tasks"):
        task_config("knn", {"seed": 3})
    with pytest.raises(ValueError, match="'finetune' is not an evaluation on frozen features; there are: knn, knn_w"):
        task_config("finetune", {})


@pytest.mark.parametrize("task", TASKS)
def test_wrong_arguments_of_every_evaluation(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for changes, message in (
        ({"run": ""}, "run must not be empty"),
        ({"run": None}, "run must be str, got None"),
        ({"out": ""}, "out must not be empty"),
        ({"data": ""}, "data must not be empty"),
        ({"test_data": ""}, "test_data must not be empty"),
        ({"seed": float("nan")}, "seed must be int, got nan"),
        ({"seed": 2**64}, "seed must lie between"),
        ({"num_workers": 10**5}, "num_workers must be at most 512"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(task, **{"run": "no-run"} | changes)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_are_stored_as_json(tmp_path):
    encoder = tiny_encoder()
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    data = {"data": "digits", "labels_per_class": np.int64(2), "seeds": np.int32(1), "seed": np.uint8(3)}
    evaluate("knn", tmp_path / "encoder.safetensors", out=tmp_path, k=np.int64(5), temperature=np.float32(0.5), **data)
    stored = json.loads((tmp_path / "evaluation" / "knn.json").read_text())
    assert (stored["configuration"]["k"], stored["configuration"]["temperature"], stored["seed"]) == (5, 0.5, 3)
    assert stored["overrides"]["k"] == 5


def test_a_sweep_is_reached_from_the_linear_probe(run):
    """The flag of the command line is an option in Python, and the name of the task works in both."""
    swept = dmjd.evaluate("linear", run, sweep=True, steps=2, device="cpu")
    assert swept["task"] == "linear_sweep"
    assert swept == dmjd.evaluate("linear_sweep", run, steps=2, device="cpu")
    assert dmjd.evaluate("linear", run, sweep=False, steps=2, device="cpu")["task"] == "linear"
    with pytest.raises(ValueError, match="sweep must be bool"):
        dmjd.evaluate("linear", run, sweep="yes")
    with pytest.raises(ValueError, match="does not take sweep"):
        dmjd.evaluate("knn", run, sweep=True)
