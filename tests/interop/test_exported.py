"""Programs of encoders that know invalid pixels: they leave these out of the features, as the encoder does."""

import pytest
import torch
from exported_encoders import SMALL, SMALL_CONV, holed_images, run_lines, saved

from dmjd.images.invalid import mark_invalid
from dmjd.interop.export import export

VIT = ("vit_tiny_patch8", (32, 24), 3, {"class_token": True} | SMALL)
CONV = ("conv_vit_tiny_patch8", 32, 1, SMALL_CONV)


# Slow: the others have both formats and both encoders.
@pytest.mark.parametrize(
    ("format", "ending", "name", "size", "chans", "options"),
    [
        ("torch", "pt2", *VIT),
        ("onnx", "onnx", *CONV),
        pytest.param("torch", "pt2", *CONV, marks=pytest.mark.slow),
        pytest.param("onnx", "onnx", *VIT, marks=pytest.mark.slow),
    ],
)
def test_programs_pool_as_encode_does(format, ending, name, size, chans, options, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    encoder, file = saved(tmp_path, name, size, chans, nodata="auto", **options)
    exported = export(file, format=format, out=tmp_path / f"encoder.{ending}")
    assert "; NaN where invalid" in exported.usage
    images = holed_images(encoder)
    marked = mark_invalid(images)
    expected = encoder.encode(marked)
    with torch.inference_mode():
        tokens = encoder(marked)
        assert (encoder.pool(tokens)[:2] - expected[:2]).abs().max() > 0.01, "it matters"
    for given in (images, marked):
        found = run_lines(exported.usage, images=given if format == "torch" else given.numpy())
        torch.testing.assert_close(torch.as_tensor(found["tokens"]), tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.as_tensor(found["features"]), expected, rtol=1e-4, atol=1e-4)
    single = run_lines(exported.usage, images=images[:1] if format == "torch" else images[:1].numpy())["features"]
    torch.testing.assert_close(torch.as_tensor(single), expected[:1], rtol=1e-4, atol=1e-4)


def test_without_the_setting_programs_say_nothing_of_it(tmp_path):
    _, file = saved(tmp_path, "vit_tiny_patch8", 16, **SMALL)
    assert "invalid" not in export(file, format="torch", out=tmp_path / "encoder.pt2").usage
