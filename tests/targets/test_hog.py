"""HOG targets against a slow reference written from the definition, value by value."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd import create_encoder
from dmjd.config.tokens import default_cell
from dmjd.encoders.base import Encoder
from dmjd.targets import hog
from dmjd.targets.base import whiten
from dmjd.targets.hog import HogSettings, HogTarget


def encoder(patch: int, channels: int = 3) -> Encoder:
    return create_encoder(f"vit_tiny_patch{patch}", 2 * patch, channels, embed_dim=32, depth=1, num_heads=2)


def slow_hog(images: np.ndarray, cell: int, bins: int) -> np.ndarray:
    """The definition, pixel by pixel in float64; angles are folded to half a turn after atan2."""
    B, C, H, W = images.shape
    out = np.zeros((B, C, H // cell, W // cell, bins))
    for b, c, i, j in np.ndindex(B, C, H, W):
        x = images[b, c].astype(np.float64)
        g_row = x[i + 1, j] - x[i - 1, j] if 0 < i < H - 1 else 0.0
        g_col = x[i, j + 1] - x[i, j - 1] if 0 < j < W - 1 else 0.0
        degrees = math.degrees(math.atan2(g_row, g_col)) % 180.0
        k = int(degrees // (180.0 / bins))
        out[b, c, i // cell, j // cell, k] += math.hypot(g_row, g_col) / cell**2
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2, 4, 7, 8, 9, 12, 18]), st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 256]),
)  # fmt: skip
def test_hog_equals_the_slow_reference(cell, bins, channels, rows, columns, seed, levels):
    """With few gray levels, flat areas and exact angles of 0, 45, 90, 135 and 180 degrees are frequent."""
    values = np.random.default_rng(seed).integers(0, levels, (1, channels, rows * cell, columns * cell))
    images = (values * (255 // (levels - 1))).astype(np.uint8)
    actual = hog(torch.from_numpy(images), cell, bins)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), slow_hog(images, cell, bins), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_hog_takes_any_number_type(dtype):
    images = torch.randint(0, 256, (2, 3, 16, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(hog(images.to(dtype), 4), hog(images.float(), 4))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 7, 8]), st.sampled_from([1, 4, 9, 12, 40]), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 256]),
)  # fmt: skip
def test_hog_of_bytes_has_the_bits_of_hog_of_floats(cell, bins, rows, columns, seed, levels):
    """uint8 images use a table: steep and flat gradients, images of one and two pixels, more bins than it supports."""
    values = np.random.default_rng(seed).integers(0, levels, (2, 2, rows * cell, columns * cell))
    images = torch.from_numpy((values * (255 // (levels - 1))).astype(np.uint8))
    assert torch.equal(hog(images, cell, bins), hog(images.float(), cell, bins))


def test_hog_in_chunks_equals_hog_of_single_images():
    """Images larger than one chunk, and a number of them that no chunk size divides."""
    images = torch.randint(0, 256, (3, 1, 640, 512), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    assert torch.equal(hog(images), torch.cat([hog(image[None]) for image in images]))
    small = images[:, :, :320, :96].reshape(-1, 1, 32, 32)[:, :, :24]
    assert torch.equal(hog(small.repeat(5, 1, 1, 1))[-len(small) :], hog(small))


@pytest.mark.parametrize(
    ("d_row", "d_col", "expected_bin"),
    [(0, 1, 0), (0, -1, 0), (1, 100, 0), (-1, -100, 0), (1, -100, 8), (-1, 100, 8), (1, 0, 4), (-1, 0, 4), (1, 1, 2)],
)
def test_orientation_is_unsigned_and_180_degrees_is_0(d_row, d_col, expected_bin):
    """Plane ramps: the inner cell holds one orientation; rising and falling ramps are the same."""
    i, j = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    cells = hog((1000 + d_row * i + d_col * j)[None, None], cell_size=3)[0, 0]
    center = cells[1, 1]
    assert center.nonzero().flatten().tolist() == [expected_bin]
    assert center[expected_bin].item() == pytest.approx(2 * math.hypot(d_row, d_col), rel=1e-5)


def test_hog_ignores_a_constant_and_scales_with_contrast():
    images = torch.randint(0, 100, (1, 3, 16, 16), generator=torch.Generator().manual_seed(1)).float()
    torch.testing.assert_close(hog(images + 50), hog(images))
    torch.testing.assert_close(hog(images * 2), hog(images) * 2)
    assert not hog(torch.full((1, 1, 16, 16), 7.0)).any()


def test_hog_channels_are_separate():
    images = torch.randint(0, 256, (1, 5, 16, 16), generator=torch.Generator().manual_seed(2))
    together = hog(images, 8)
    for c in range(5):
        assert torch.equal(together[:, c : c + 1], hog(images[:, c : c + 1], 8))


@pytest.mark.parametrize(
    ("cell", "bins", "message"),
    [
        (3, 9, "HOG cell of 3 pixels does not divide the image of 16 x 32"),
        (0, 9, "cell_size must be at least 1"),
        (8, 0, "num_bins must lie between 1 and 255"),
        (8, 256, "num_bins must lie between 1 and 255"),
        (8.0, 9, "cell_size must be int, got 8.0"),
    ],
)
def test_hog_errors(cell, bins, message):
    with pytest.raises(ValueError, match=message):
        hog(torch.zeros(1, 3, 16, 32), cell, bins)


@pytest.mark.parametrize(
    ("patch", "cell"), [(16, 8), (14, 7), (8, 4), (4, 2), (2, 1), (9, 3), (15, 5), (3, 1), (7, 7), (5, 5), (1, 1)]
)
def test_default_cell(patch, cell):
    assert default_cell(patch) == cell
    assert HogTarget(encoder(patch)).cell_size == cell


@pytest.mark.parametrize(
    ("patch", "cell", "bins", "channels", "grid"),
    [(8, None, 9, 3, (2, 3)), (6, 2, 5, 1, (3, 1)), (4, 4, 12, 5, (1, 2))],
)
def test_hog_target_order_and_whitening(patch, cell, bins, channels, grid):
    target = HogTarget(encoder(patch, channels), HogSettings(cell, bins))
    s, side = target.cells, target.cell_size
    assert target.dim == s * s * bins * channels
    shape = (2, channels, grid[0] * patch, grid[1] * patch)
    raw = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    actual = target(torch.full(shape, float("nan")), raw)  # the normalized image is not used
    assert actual.shape == (2, grid[0] * grid[1], target.dim)
    assert actual.dtype == torch.float32
    cells = slow_hog(raw.numpy(), side, bins)
    white = (cells - cells.mean(-1, keepdims=True)) / np.sqrt(cells.var(-1, keepdims=True) + 1e-5)
    for b, row, column in np.ndindex(2, *grid):
        for r, q, k, c in np.ndindex(s, s, bins, channels):
            entry = ((r * s + q) * bins + k) * channels + c
            expected = white[b, c, row * s + r, column * s + q, k]
            assert actual[b, row * grid[1] + column, entry].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_patch_of_16_holds_108_numbers():
    assert HogTarget(encoder(16)).dim == 108


def test_hog_target_needs_a_cell_that_divides_the_patch():
    with pytest.raises(ValueError, match="hog_cell 3 does not divide the 16-pixel patch"):
        HogTarget(encoder(16), HogSettings(cell=3))


def test_whitening():
    x = torch.randn(3, 4, 9) * 5 + 2
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(whiten(x), expected)
    assert not whiten(torch.full((2, 9), 3.0)).any()


@pytest.mark.parametrize("images", [np.zeros((1, 3, 16, 16)), torch.zeros(3, 16, 16), None, ""])
def test_what_is_no_batch_of_images_is_refused(images):
    with pytest.raises(ValueError, match=r"images_0_255 must be a \[B, C, H, W\] tensor, got"):
        hog(images)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (math.nan, torch.float16),
        (math.nan, torch.float32),
        (math.inf, torch.bfloat16),
        (-math.inf, torch.float32),
        (1e300, torch.float64),
    ],
)
def test_values_that_are_not_finite(value, dtype):
    images = torch.ones(2, 3, 16, 16, dtype=dtype)
    images[1, 2, 5, 7] = value
    with pytest.raises(ValueError, match="images_0_255 has values that are not finite"):
        hog(images)


@pytest.mark.parametrize("change", [lambda x: x.to(torch.complex64), torch.Tensor.to_sparse])
def test_images_that_are_no_dense_real_numbers(change):
    with pytest.raises(ValueError, match="images_0_255 must be a dense tensor of real numbers, got"):
        hog(change(torch.ones(1, 3, 16, 16)))


def test_hog_leaves_out_gradients_that_need_an_invalid_pixel():
    """Steps between columns 1 and 2, and 5 and 6; the pixel in row 1, column 5 is invalid."""
    image = torch.zeros(1, 1, 4, 8)
    image[..., 2:] = 90
    image[..., 6:] = 200
    valid = torch.ones_like(image, dtype=torch.bool)
    valid[0, 0, 1, 5] = False
    found = hog(image, 4, 9, valid)
    by_hand = torch.zeros(1, 1, 1, 2, 9)
    by_hand[..., 0, 0] = 4 * 2 * 90 / 16  # columns 1 and 2 of four rows
    # Columns 5 and 6, without that pixel, the one to its right, and the one below, whose row difference needs it. The
    # one above lies on the border, where there is no row difference.
    by_hand[..., 1, 0] = (4 * 2 - 3) * 110 / 16
    torch.testing.assert_close(found, by_hand)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
@settings(max_examples=20, deadline=None)
def test_hog_of_valid_does_not_depend_on_invalid_values(seed, channels):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, channels, 16, 24, generator=generator) * 255
    valid = torch.rand(images.shape, generator=generator) > 0.2
    garbage = torch.where(valid, images, torch.rand(images.shape, generator=generator) * 255)
    target = HogTarget(encoder(8, channels))
    first, second = (target.of_valid(x, x, valid) for x in (images, garbage))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    everything = torch.ones_like(valid)
    assert torch.equal(target.of_valid(images, images, everything), target(images, images))


@pytest.mark.parametrize("chans", [1, 3, 5])
def test_colors_follow_the_edges_cell_by_cell(chans):
    """The edges are those without colors; then come the means of the cells: cell row, cell column, channel."""
    encoder = create_encoder("vit_tiny_patch8", img_size=(16, 24), in_chans=chans, depth=1)
    raw = torch.randint(0, 256, (2, chans, 16, 24), dtype=torch.uint8)
    normalized = torch.randn(2, chans, 16, 24)
    plain, colored = HogTarget(encoder), HogTarget(encoder, HogSettings(color=True))
    targets = colored(normalized, raw)
    assert targets.shape == (2, 6, colored.dim)
    assert colored.dim == plain.dim + 4 * chans
    assert torch.equal(targets[..., : plain.dim], plain(normalized, raw))
    colors = targets[..., plain.dim :].view(2, 2, 3, 2, 2, chans)  # B, h, w, cell row, cell column, channel
    torch.testing.assert_close(colors[1, 1, 2, 0, 1], normalized[1, :, 8:12, 20:24].mean((1, 2)))


def test_colors_of_invalid_pixels_do_not_count():
    encoder = create_encoder("vit_tiny_patch8", img_size=8, depth=1)
    target = HogTarget(encoder, HogSettings(color=True))
    raw, normalized = torch.rand(1, 3, 8, 8) * 255, torch.full((1, 3, 8, 8), 2.0)
    valid = torch.ones(1, 3, 8, 8, dtype=torch.bool)
    assert torch.equal(target.of_valid(normalized, raw, valid), target(normalized, raw))
    valid[..., :4, :4] = False  # the first cell
    valid[..., 4, 4] = False  # a pixel of the last one
    normalized = torch.where(valid, normalized, 0.0)
    colors = target.of_valid(normalized, raw, valid)[0, 0, -12:].view(4, 3)
    torch.testing.assert_close(colors, torch.tensor([0.0, 2.0, 2.0, 2.0]).view(4, 1).expand(4, 3))
