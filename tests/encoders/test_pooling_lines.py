"""Models of other libraries pool all tokens: the printed lines leave the invalid ones out."""

import re
from pathlib import Path

import pytest
import torch
from exported_encoders import SMALL, SMALL_CONV, holed_images, run_lines, saved

from dmjd.cli.main import main
from dmjd.encoders.pooling_lines import invalid_settings
from dmjd.encoders.weights import load_encoder
from dmjd.images.invalid import mark_invalid
from dmjd.images.preprocess import Preprocess
from dmjd.interop.export import export


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
@pytest.mark.parametrize("chans", [1, 3])
def test_the_lines_for_timm_are_encode(out, chans, tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", (32, 24), chans, nodata="auto", class_token=True, **SMALL)
    usage = export(file, format="timm", out=tmp_path / out).usage
    assert "trained with invalid pixels (nodata auto)" in usage
    images = holed_images(encoder)
    features = run_lines(usage, pixels=images)["features"]
    torch.testing.assert_close(features, encoder.encode(mark_invalid(images)), rtol=1e-5, atol=1e-5)


def test_the_lines_for_transformers_are_the_mean_valid_token(tmp_path):
    pytest.importorskip("transformers")
    encoder, file = saved(tmp_path, "vit_tiny_patch8", 32, 3, nodata="-9999", class_token=True, **SMALL)
    usage = export(file, format="hf", out=tmp_path / "folder").usage
    card = (tmp_path / "folder" / "README.md").read_text()
    assert usage.splitlines()[-1] in card
    assert "| invalid pixels | nodata -9999;" in card
    lines = usage.splitlines()
    lines = [line for line in lines if "AutoImageProcessor" not in line and "processor(" not in line]
    images = holed_images(encoder)
    found = run_lines("\n".join(["from transformers import AutoModel", *lines]), pixels=images)["features"]
    marked = mark_invalid(images)
    with torch.inference_mode():
        expected = encoder.mean_patch_token(encoder.forward_features(marked), encoder.valid_tokens(marked))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_card_has_both_ways(tmp_path, capsys):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", 32, 3, nodata="auto", **SMALL)
    out = tmp_path / "folder"
    assert main(["export", str(file), "--format", "hub", "--out", str(out)]) == 0
    ours, theirs = (code.replace("FOLDER", str(out)) for code in code_of((out / "README.md").read_text()))
    images = holed_images(encoder)
    expected = encoder.encode(mark_invalid(images))
    found = run_lines(theirs, pixels=images)["features"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "encoder.encode(encoder.preprocess(" in ours, "which leaves them out by itself"
    assert load_encoder(out).preprocess == encoder.preprocess


def test_other_encoders_have_no_such_lines(tmp_path):
    _, file = saved(tmp_path, "conv_vit_tiny_patch8", 32, **SMALL_CONV)
    export(file, format="hub", out=tmp_path / "folder")
    assert "valid" not in Path(tmp_path / "folder" / "README.md").read_text()


def test_settings_by_name():
    assert invalid_settings(Preprocess((8, 8), nodata="auto")) == "nodata auto"
    assert invalid_settings(Preprocess((8, 8), nodata="-1", alpha="invalid")) == "nodata -1, alpha invalid"
