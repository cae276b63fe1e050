"""Drift from the starting weights: 1 for the same encoder, falling as it moves; kept over a resume."""

import pytest
import torch
from support import TINY_FIELDS

import dmjd
from dmjd import create_encoder
from dmjd.data.sources.registry import open_source
from dmjd.evaluation.frozen.drift import Drift, shared_neighbors
from dmjd.images.preprocess import Preprocess
from dmjd.runs.metrics import read_metrics


def tiny_encoder(seed: int) -> dmjd.encoders.Encoder:
    torch.manual_seed(seed)
    return create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=2, num_heads=2).eval()


def test_the_same_encoder_has_not_moved_and_another_one_has(tmp_path, image_folder):
    source, preprocess, file = open_source(str(image_folder)), Preprocess((32, 32)), tmp_path / "start.safetensors"
    drift = Drift(source, preprocess, file, tiny_encoder(0))
    assert drift(tiny_encoder(0)) == pytest.approx({"drift_cosine": 1.0, "drift_neighbors": 1.0}, abs=1e-5)
    other = drift(tiny_encoder(1))
    assert other["drift_cosine"] < 0.5
    assert 0.0 <= other["drift_neighbors"] < 1.0
    resumed = Drift(source, preprocess, file)  # from the file
    assert resumed(tiny_encoder(1)) == other


def test_features_of_other_images_are_refused(tmp_path, image_folder):
    source, preprocess, file = open_source(str(image_folder)), Preprocess((32, 32)), tmp_path / "start.safetensors"
    Drift(source, preprocess, file, tiny_encoder(0))
    with pytest.raises(ValueError, match=r"start\.safetensors holds the features of other images"):
        Drift(open_source("digits"), preprocess, file)


def test_shared_neighbors_by_hand():
    a = torch.tensor([[0.0, 1.0], [0.1, 1.0], [0.0, -1.0], [0.1, -1.0]])
    assert shared_neighbors(a, a, k=1) == 1.0
    assert shared_neighbors(a, a * 3, k=1) == 1.0  # lengths do not matter
    assert shared_neighbors(a, a[[0, 2, 1, 3]], k=1) == 0.0


def test_a_run_from_trained_weights_logs_its_drift_and_continues_it(tmp_path, image_folder):
    first = dmjd.recipes.dmjd(str(image_folder), str(tmp_path / "first"), **TINY_FIELDS | {"steps": 1})
    dmjd.pretrain(first)
    config = first.replace(out=str(tmp_path / "second"), init=str(tmp_path / "first"), steps=2, eval_every=1, blr=0.1)
    dmjd.pretrain(config)
    (tmp_path / "first" / "encoder.safetensors").unlink()  # a resumed run does not need the weights it began with
    dmjd.pretrain(config.replace(steps=4))
    lines = read_metrics(tmp_path / "second" / "metrics.jsonl")
    drift = {line["step"]: line["drift_cosine"] for line in lines if "drift_cosine" in line}
    assert drift.keys() >= {1, 3}  # before and after the resume
    assert drift[1] == pytest.approx(1.0)  # the learning rate of the first step is 0
    assert drift[3] < 0.9
