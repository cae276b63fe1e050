"""Folders for timm: no arguments are needed for the right model, preprocessing and weights."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from exported_encoders import SMALL, random_images, run_lines, saved, smooth_image
from PIL import Image

from dmjd.encoders.stored import encoder_bytes
from dmjd.interop.export import export


@pytest.mark.parametrize(
    ("name", "size", "chans", "options"),
    [
        ("vit_tiny_patch16", 64, 3, {"class_token": True, "depth": 2}),
        ("vit_tiny_patch8", 32, 3, SMALL),
        ("vit_small_patch8", (32, 48), 1, {"class_token": True} | SMALL),
        ("vit_base_patch4", (16, 24), 5, {"mlp_ratio": 2.5} | SMALL),
    ],
)
def test_timm_needs_no_arguments_but_the_folder(name, size, chans, options, tmp_path):
    encoder, file = saved(tmp_path, name, size, chans, **options)
    exported = export(file, format="timm", out=tmp_path / "new" / "it's")
    model = run_lines(exported.usage)["model"].eval()
    images = random_images(encoder)
    with torch.inference_mode():
        features = encoder.forward_features(images)
        torch.testing.assert_close(model.forward_features(images), features, rtol=1e-5, atol=1e-5)
        last = model.forward_intermediates(images, 1, output_fmt="NLC", intermediates_only=True)[0]
        torch.testing.assert_close(last, encoder.block_outputs(images, 1)[0], rtol=1e-5, atol=1e-5)
    config = timm.data.resolve_model_data_config(model)
    assert (tuple(config["input_size"]), config["crop_pct"]) == ((chans, *encoder.img_size), 1.0)
    assert (config["interpolation"], config["crop_mode"]) == ("bicubic", "center")
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.4,) * chans, (0.2,) * chans)
    with_head = timm.create_model(f"local-dir:{exported.path}", pretrained=True, num_classes=3).eval()
    with torch.inference_mode():
        assert with_head(images).shape == (2, 3)
        torch.testing.assert_close(with_head.forward_features(images), features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_transform_of_timm_knows_the_value_range(kind, tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", 32, **SMALL)
    encoder.preprocess = dataclasses.replace(encoder.preprocess, value_range=(20, 220))
    file.write_bytes(encoder_bytes(encoder))
    out = tmp_path / ("new" if kind == "folder" else "new.safetensors")
    model = run_lines(export(file, format="timm", out=out).usage)["model"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = Image.fromarray((20 + 200 * np.asarray(smooth_image(32, 32)) / 255).astype(np.uint8))
    assert (transform(image) - encoder.preprocess(image)[0]).abs().max() < 0.05


@pytest.mark.parametrize(("size", "stored"), [(32, (90, 60)), ((32, 48), (40, 200)), (32, (32, 32))])
def test_the_transform_of_timm_is_the_preprocessing(size, stored, tmp_path):
    encoder, file = saved(tmp_path, "vit_tiny_patch8", size, **SMALL)
    exported = export(file, format="timm", out=tmp_path / "folder")
    model = run_lines(exported.usage)["model"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = smooth_image(*stored)
    theirs, ours = transform(image), encoder.preprocess(image)[0]
    assert theirs.shape == ours.shape
    levels = (theirs - ours).abs() * 0.2 * 255
    assert levels.mean() < 0.5  # of 256 gray levels
    assert levels.max() < 8
