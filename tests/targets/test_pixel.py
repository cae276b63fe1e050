"""Pixel targets against MAE's formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd import create_encoder
from dmjd.encoders.base import Encoder
from dmjd.targets.pixel import PixelTarget


def encoder(patch: int, channels: int = 3) -> Encoder:
    return create_encoder(f"vit_tiny_patch{patch}", 2 * patch, channels, embed_dim=32, depth=1, num_heads=2)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 3, 5]), st.sampled_from([2, 4, 7]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31)
)
def test_pixel_target_equals_maes_formula(channels, patch, h, w, seed):
    images = torch.randn(2, channels, h * patch, w * patch, generator=torch.Generator().manual_seed(seed))
    x = images.reshape(2, channels, h, patch, w, patch)
    x = torch.einsum("nchpwq->nhwpqc", x).reshape(2, h * w, patch * patch * channels)
    expected = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1.0e-6) ** 0.5
    target = PixelTarget(encoder(patch, channels))
    actual = target(images, torch.full_like(images, float("nan")))  # the raw image is not used
    assert actual.shape[-1] == target.dim
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    mean, std = target.patch_statistics(x)
    torch.testing.assert_close(actual * std + mean, x, rtol=1e-4, atol=1e-5)


def test_pixel_target_of_a_flat_patch_is_zero():
    images = torch.full((1, 1, 4, 4), 0.3)
    assert PixelTarget(encoder(4, 1))(images, images).abs().max() < 1e-3
    with pytest.raises(ValueError, match="more than one value"):
        PixelTarget(encoder(1, 1))


def test_pixel_target_has_the_statistics_of_valid_pixels():
    target = PixelTarget(encoder(2, 1))
    image = torch.tensor([[[[1.0, 3.0, 1.0, 2.0], [50.0, 5.0, 3.0, 4.0]]]])
    valid = torch.ones_like(image, dtype=torch.bool)
    valid[0, 0, 1, 0] = False
    found = target.of_valid(image, image, valid)
    # 1, 3 and 5: mean 3, unbiased variance 4; the invalid value is 0.
    torch.testing.assert_close(found[0, 0], torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    assert torch.equal(found[0, 1], target(image, image)[0, 1])
    nothing = target.of_valid(image, image, torch.zeros_like(valid))
    assert torch.equal(nothing, torch.zeros_like(nothing))
