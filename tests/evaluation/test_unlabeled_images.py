"""Images of a list that have no label: evaluations leave them out, tables of features say so."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from dense_sets import make_run
from PIL import Image
from support import mistake

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.registry import open_source
from dmjd.evaluation.frozen.online_knn import OnlineKnn
from dmjd.evaluation.run import evaluate
from dmjd.images.preprocess import Preprocess
from dmjd.warning import DMJDWarning

LABELS = {"train": ["x", "", "y", "y", "x", "y"], "test": ["y", "x", ""]}


@pytest.fixture
def file(tmp_path):
    """A list of nine images in two splits, two of them without a label."""
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    for split, labels in LABELS.items():
        for i, label in enumerate(labels):
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,{label},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    return tmp_path / "list.csv"


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        PretrainConfig(img_size=32, labels="folder", encoder="vit_tiny_patch8").to_json()
    )
    return tmp_path / "run"


@pytest.mark.parametrize("task", ["knn", "finetune"])
def test_evaluations_leave_them_out(file, run, task):
    settings = {"steps": 1, "batch_size": 2} if task == "finetune" else {}
    with pytest.warns(DMJDWarning) as caught:
        result = evaluate(task, run, data=file, labels="column", num_workers=0, device="cpu", **settings)
    said = [str(warning.message) for warning in caught]
    assert f"1 of 6 images of {file} (train) have no label and are left out" in said
    assert f"1 of 3 images of {file} (test) have no label and are left out" in said
    assert (result["data"]["num_train"], result["data"]["num_test"], result["data"]["classes"]) == (5, 2, 2)


def test_knn_while_training_leaves_them_out(file):
    train, test = (open_source(file, split=split, labels="column") for split in ("train", "test"))
    assert OnlineKnn(train, test, Preprocess((32, 32)), num_workers=0).num_images == 7


def test_features_of_them_have_no_class(file, run, tmp_path):
    dmjd.embed(run, data=file, label_column="label", out=tmp_path / "x.parquet", num_workers=0, device="cpu")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["label"].to_pylist() == [0, -1, 1, 1, 0, 1]
    assert table["class"].to_pylist() == LABELS["train"]


def test_settings_of_lists_are_checked(file, run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"there is no setting label_colum; did you mean 'label_column'\?"):
        dmjd.embed(run, data=file, label_colum="label", out=tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="give --labels folder or --label-column, not both"):
        evaluate("knn", run, data=file, labels="folder", label_column="label")
    said = mistake(capsys, "show", "neighbors", run, "--data", file, "--label-column", "kind")
    assert "has no label column ('kind')" in said
    said = mistake(capsys, "embed", run, "--data", file, "--split", "val", "--out", tmp_path / "x.parquet")
    assert "has no val part" in said
