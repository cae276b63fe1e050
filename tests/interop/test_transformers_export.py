"""Folders for transformers: its own classes load them, and compute what the encoder does."""

import dataclasses

import numpy as np
import pytest
import torch
from exported_encoders import SMALL, SMALL_CONV, random_images, run_lines, saved, smooth_image

from dmjd.encoders.sources import read_weights
from dmjd.encoders.stored import encoder_bytes
from dmjd.interop.export import export

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(("size", "chans"), [(32, 3), ((16, 24), 1)])
def test_transformers_loads_the_folder(size, chans, tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", size, chans, class_token=True, mlp_ratio=2.5, **SMALL)
    exported = export(file, format="hf", out=tmp_path / "folder")
    images = random_images(encoder)
    for kind in (transformers.ViTModel, transformers.AutoModel):
        model = kind.from_pretrained(exported.path, add_pooling_layer=False)
        assert not model.training
        with torch.inference_mode():
            tokens = model(images).last_hidden_state
            torch.testing.assert_close(tokens, encoder.forward_features(images), rtol=1e-5, atol=1e-5)
    weights = read_weights(exported.path)  # --init: the same table, backwards
    assert weights.preprocess == encoder.preprocess
    assert {key: value.tolist() for key, value in weights.tensors.items()} == {
        key: value.tolist() for key, value in encoder.state_dict().items()
    }


def test_the_printed_lines_and_the_processor(tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", 32, class_token=True, **SMALL)
    exported = export(file, format="hf", out=tmp_path / "it's")
    image = smooth_image(90, 60)
    names = run_lines(exported.usage, images=[image])
    theirs = names["processor"](image, return_tensors="pt")["pixel_values"]
    ours = encoder.preprocess(image)
    assert theirs.shape == ours.shape
    assert ((theirs - ours).abs() * 0.2 * 255).mean() < 1.5  # of 256 gray levels
    with torch.inference_mode():
        torch.testing.assert_close(names["tokens"], encoder.forward_features(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("value_range", "dtype"), [((20, 220), np.uint8), ((100, 4000), np.uint16)])
def test_the_processor_knows_the_value_range(value_range, dtype, tmp_path):
    """Stored values in the range are normalized as the encoder's own preprocessing does, of 16 bits too."""
    encoder, file = saved(tmp_path, "vit_tiny_patch8", 32, class_token=True, **SMALL)
    encoder.preprocess = dataclasses.replace(encoder.preprocess, value_range=value_range)
    file.write_bytes(encoder_bytes(encoder))
    exported = export(file, format="hf", out=tmp_path / "folder")
    low, high = value_range
    image = (low + (high - low) / 255 * np.asarray(smooth_image(32, 32), float)).astype(dtype)
    processor = transformers.AutoImageProcessor.from_pretrained(exported.path)
    theirs = processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert (theirs - encoder.preprocess(image)).abs().max() < 0.05


def test_without_preprocessing_there_is_no_processor(tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", 16, preprocess=False, class_token=True, **SMALL)
    exported = export(file, format="hf", out=tmp_path / "folder")
    assert {f.name for f in exported.path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    names = run_lines(exported.usage, images=(images := random_images(encoder)))
    torch.testing.assert_close(names["tokens"], encoder.forward_features(images), rtol=1e-5, atol=1e-5)


def test_what_transformers_does_not_have_is_one_line_with_an_alternative_that_works(tmp_path):
    _, file = saved(tmp_path, "conv_vit_tiny_patch8", 16, **SMALL_CONV)
    with pytest.raises(ValueError, match=r"other parts than ConvViT. Use --format torch"):
        export(file, format="hf", out=tmp_path / "folder")
    encoder, file = saved(tmp_path, "vit_tiny_patch8", (16, 24), **SMALL)
    with pytest.raises(ValueError, match=r"no class token.* Use --format timm .* AutoModel") as caught:
        export(file, format="hf", out=tmp_path / "folder")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "folder").exists()
    exported = export(file, format="timm", out=tmp_path / "folder")
    model = transformers.AutoModel.from_pretrained(exported.path)
    images = random_images(encoder)
    with torch.inference_mode():
        tokens = model(images).last_hidden_state
        torch.testing.assert_close(tokens, encoder.forward_features(images), rtol=1e-5, atol=1e-5)


def test_without_transformers_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs transformers: pip install transformers"):
        export(tmp_path / "encoder.safetensors", format="hf", out=tmp_path / "folder")
