"""Every command works on a run folder written by version 0.1."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from support import GOLDEN

import dmjd
from dmjd.encoders.classifier import Classifier
from dmjd.runs.build import load_model, read_config

FORMER = GOLDEN / "run_v0.1"
SETTINGS = (
    "embed_dim=12, depth=2, num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2, batch_size=16, log_every=1, "
    "eval_every=0, final_eval=False, device='cpu', precision='fp32', max_unreadable=7"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return shutil.copytree(FORMER, tmp_path_factory.mktemp("former") / "run")


def test_configuration_model_and_encoder_load(run):
    config = read_config(run)
    assert (config.masks, config.max_unreadable, config.steps) == ("disjoint", 7, 4)
    model, _ = load_model(run)
    saved = load_file(run / "checkpoints" / "final.safetensors")
    decoder, head = model.branches["mim"].decoder, model.branches["vis"].head
    assert torch.equal(decoder.mask_token, saved["model.decoder.mask_token"])
    assert torch.equal(head.predictor.weight, saved["model.distillation.predictor.weight"])
    assert len(model.state_dict()) == sum(key.startswith("model.") for key in saved)
    encoder = dmjd.load_encoder(run)
    weights = model.encoder.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())
    assert isinstance(dmjd.load_classifier(run), Classifier)


def test_evaluate_and_compare(run, image_folder, tmp_path):
    former = json.loads((run / "evaluation" / "knn.json").read_text())
    for part in ("train", "test"):
        shutil.copytree(image_folder, tmp_path / "data" / part)
    result = dmjd.evaluate("knn", run, data=tmp_path / "data", labels="folder", labels_per_class=5, device="cpu")
    assert result.keys() >= {"result", "random_init", "raw_pixels"}
    assert former.keys() <= result.keys() | {"seconds"}
    comparison = dmjd.compare(run, FORMER)
    assert ("knn", "top1") in comparison.scores


def test_embed_and_export(run, image_folder, tmp_path):
    file = dmjd.embed(run, out=tmp_path / "features.npy", data=image_folder, device="cpu", num_workers=0)
    assert file.stat().st_size > 24 * 12 * 4
    for kind in ("safetensors", "timm"):
        assert dmjd.export(run, format=kind, out=tmp_path / f"{kind}.safetensors").path.exists()


def test_resume_ends_with_the_same_bits(tmp_path):
    """Nine steps, four of them with version 0.1. On another kind of CPU, results may differ by rounding."""
    resumed = shutil.copytree(FORMER, tmp_path / "run")
    code = (
        "import dmjd\n"
        f"for out, steps in (({str(tmp_path / 'straight')!r}, 4), ({str(resumed)!r}, 9)):\n"
        f"    dmjd.pretrain(dmjd.recipes.digits(out=out, steps=steps, {SETTINGS}))\n"
    )
    assert forked.run(forked.execute, code, log=tmp_path / "log", seconds=240) == 0, (tmp_path / "log").read_text()
    weights = [
        load_file(file)
        for file in (
            *(tmp_path / "straight/encoder.safetensors", FORMER / "encoder.safetensors"),
            *(resumed / "encoder.safetensors", GOLDEN / "run_v0.1_nine_steps.safetensors"),
        )
    ]
    straight, former, nine, expected = weights
    assert nine.keys() == expected.keys()
    exact = all(torch.equal(straight[key], former[key]) for key in former)
    for key, value in expected.items():
        torch.testing.assert_close(nine[key], value, rtol=0, atol=0 if exact else 1e-5)
    assert any(not torch.equal(value, former[key]) for key, value in nine.items())
