"""The validation part of the data: what trainings are evaluated on while they run, and ``--split val``."""

import json
import shutil

import numpy as np
import pytest
from dense_sets import make_detection_set, make_run, make_segmentation_set
from image_sets import save
from PIL import Image
from support import mistake

from dmjd.cli.main import main
from dmjd.config.pretrain import PretrainConfig
from dmjd.evaluation.comparability import data_texts
from dmjd.evaluation.run import evaluate
from dmjd.evaluation.supervised import dense_task
from dmjd.warning import DMJDWarning

QUICK = {"img_size": 32, "decoder_dim": 16, "batch_size": 2, "num_workers": 0, "num_images": 0, "device": "cpu"}
ONE_STEP = {"decoder": "linear", "steps": 1, **QUICK}
FEW = {"steps": 4, "batch_size": 4, "eval_every": 0.25, "num_workers": 0, "device": "cpu", "mixup": 0, "cutmix": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Labeled images in train/, VAL/ and test/; val holds the test images, each in the other class."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 6)):
        for i in range(count):
            file = root / part / "ab"[i % 2] / f"{i}.png"
            save(file)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(file)
            if part == "test":
                (root / "VAL" / "ba"[i % 2]).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / "VAL" / "ba"[i % 2] / f"{i}.png")
    return root


def run_of(folder):
    """A run folder with an encoder and a configuration."""
    make_run(folder)
    (folder / "config.json").write_text(PretrainConfig(img_size=32, encoder="vit_tiny_patch8").to_json())
    return folder


def scores(run, result, name):
    lines = (run / result["result"]["folder"] / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def test_fine_tuning_is_evaluated_on_val_while_it_trains_and_on_test_at_the_end(root, tmp_path, capsys):
    run = run_of(tmp_path / "run")
    result = evaluate("finetune", run, data=root, labels="folder", **FEW)
    while_training = scores(run, result, "top1")
    assert len(while_training) == 4
    assert while_training[-1] == pytest.approx(1 - result["result"]["top1"])  # each label of val is wrong
    assert result["data"]["validation"] == {"name": str(root / "VAL"), "split": "val", "num": 6}
    assert (result["data"]["test"], result["data"]["split"]) == (str(root / "test"), "test")
    said = capsys.readouterr().err
    assert f"train: {root}/train, 8 images; test: {root}/test, 6; evaluated on {root}/VAL, 6, while it trains" in said
    on_val = evaluate("finetune", run, data=root, labels="folder", split="val", **FEW)
    assert scores(run, on_val, "top1")[-1] == on_val["result"]["top1"]
    assert "also while it trains: there is no validation part of its own" in capsys.readouterr().err
    assert (on_val["data"]["split"], on_val["overrides"]["split"]) == ("val", "val")


def test_features_are_evaluated_on_the_chosen_part(root, tmp_path, capsys):
    run = run_of(tmp_path / "run")
    command = ["evaluate", "knn", str(run), "--data", str(root), "--labels", "folder", "--num-workers", "0"]
    assert main([*command, "--split", "val"]) == 0
    assert f"tested on 6 images of {root / 'VAL'} (val)" in capsys.readouterr().out
    on_val, on_test = (evaluate("knn", run, data=root, labels="folder", split=split) for split in ("val", "test"))
    assert on_val["result"]["top1"] == pytest.approx(1 - on_test["result"]["top1"])
    assert data_texts(on_val)[0].endswith("/VAL (val): 6 images")
    mistake(capsys, *command, "--split", "train")


def test_without_a_test_part_val_is_tested_on(root, tmp_path):
    for part in ("train", "VAL"):
        shutil.copytree(root / part, tmp_path / "set" / part)
    result = evaluate("finetune", run_of(tmp_path / "run"), data=tmp_path / "set", labels="folder", **FEW)
    assert (result["data"]["test"], result["data"]["split"]) == (str(tmp_path / "set" / "VAL"), "val")
    assert result["data"]["validation"]["name"] == str(tmp_path / "set" / "VAL")


def test_data_without_the_part_is_a_mistake(root, tmp_path, capsys):
    for part in ("train", "test"):
        shutil.copytree(root / part, tmp_path / "set" / part)
    run = run_of(tmp_path / "run")
    for task in ("knn", "finetune"):
        said = mistake(
            capsys, "evaluate", task, run, "--data", tmp_path / "set", "--labels", "folder", "--split", "val"
        )
        assert "has no val part" in said


def test_segmentation_is_evaluated_on_val_while_it_trains(tmp_path):
    root = make_segmentation_set(tmp_path / "set", {"train": 3, "test": 3})
    shutil.copytree(root / "test", root / "val")
    result = evaluate("segmentation", make_run(tmp_path / "run"), data=root, **ONE_STEP)
    assert result["data"]["validation"] == {"name": str(root / "val" / "images"), "split": "val", "num": 3}
    assert scores(tmp_path / "run", result, "miou")[-1] == pytest.approx(result["result"]["miou"])


def unlabel(folder):
    """Replace masks by ones without a label."""
    for mask in folder.iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(mask)


def test_a_validation_part_without_labels_is_not_used(tmp_path):
    root = make_segmentation_set(tmp_path / "set", {"train": 3, "val": 2, "test": 3})
    unlabel(root / "val" / "masks")
    run = make_run(tmp_path / "run")
    with pytest.warns(DMJDWarning, match=r"masks of .*val.images hold only numbers that mean no label"):
        result = evaluate("segmentation", run, data=root, **ONE_STEP)
    assert result["data"]["validation"]["split"] == "test"
    assert scores(run, result, "miou")[-1] == pytest.approx(result["result"]["miou"])


def test_a_test_part_without_labels_is_a_mistake(tmp_path):
    root = make_segmentation_set(tmp_path / "set", {"train": 3, "val": 2, "test": 3})
    unlabel(root / "test" / "masks")
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"masks of .*test.images hold only .* --split val tests on the validation"):
        evaluate("segmentation", run, data=root, **ONE_STEP)
    unlabel(root / "val" / "masks")
    with pytest.raises(ValueError, match=r"masks of .*test.images hold only .*: there is nothing to test on$"):
        evaluate("segmentation", run, data=root, **ONE_STEP)
    assert not (run / "evaluation").exists()


def test_validation_images_without_labels_score_0_while_it_trains(tmp_path, monkeypatch):
    root = make_segmentation_set(tmp_path / "set", {"train": 3, "val": 3, "test": 3})
    unlabel(root / "val" / "masks")
    shutil.copy(root / "test" / "masks" / "01.png", root / "val" / "masks" / "01.png")
    monkeypatch.setattr(dense_task, "EVAL_IMAGES", 2)  # the first and the last
    run = make_run(tmp_path / "run")
    with pytest.warns(DMJDWarning, match=r"no pixel of 2 images of .* has a label: miou counts as 0"):
        result = evaluate("segmentation", run, data=root, **ONE_STEP)
    assert result["data"]["validation"]["split"] == "val"
    assert scores(run, result, "miou") == [0]
    assert result["result"]["miou"] > 0


def test_detection_is_evaluated_on_val_while_it_trains(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    root = make_detection_set(tmp_path / "set", {"train": 2, "val": 1, "test": 2})
    result = evaluate("detection", make_run(tmp_path / "run"), data=root, steps=1, **QUICK)
    assert result["data"]["validation"] == {"name": str(root / "val.json"), "split": "val", "num": 1}
    assert f"evaluated on {root / 'val.json'}, 1, while it trains" in capsys.readouterr().err
    on_val = evaluate("detection", make_run(tmp_path / "run"), data=root, steps=1, split="val", **QUICK)
    assert (on_val["data"]["test"], on_val["data"]["split"]) == (str(root / "val.json"), "val")
