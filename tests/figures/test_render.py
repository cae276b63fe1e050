"""Tensors as RGB images."""

import pytest
import torch
from figure_models import images_of, model_for

import dmjd.figures.render as rendering
from dmjd.targets import HogSettings, hog


def stroke_angle(glyph: torch.Tensor) -> float:
    """Angle of a stroke in degrees, from rightward to downward, by second moments: 0 horizontal, 90 vertical."""
    rows, columns = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in glyph.shape), indexing="ij")
    rr, cc, rc = ((glyph * a * b).sum() for a, b in ((rows, rows), (columns, columns), (rows, columns)))
    return float(torch.rad2deg(0.5 * torch.atan2(2 * rc, cc - rr))) % 180


@pytest.mark.parametrize(
    ("image", "angle"),
    [
        (lambda y, x: x, 90),  # grows rightward: vertical edges
        (lambda y, x: y, 0),
        (lambda y, x: x + y, 135),  # edges run from bottom left to top right: up is -y
        (lambda y, x: x - y, 45),
    ],
)
def test_strokes_lie_along_the_edges_of_the_image(image, angle):
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    cells = hog(image(y, x)[None, None].float(), cell_size=8)[0, 0]  # 4, 4, bins
    glyphs = rendering.hog_glyphs(cells / cells.max(), 25)
    middle = glyphs[25:50, 25:50]
    difference = abs((stroke_angle(middle) - angle + 90) % 180 - 90)
    assert difference <= 10.01  # half a bin
    assert middle[12, 12] == pytest.approx(1.0)


@pytest.mark.parametrize("bins", [1, 2, 9, 12])
@pytest.mark.parametrize("side", [13, 31])
def test_each_bin_has_its_own_stroke_and_brightness_is_the_weight(bins, side):
    weights = torch.zeros(2, 3, 4, bins)
    weights[1, 2, 3, bins - 1] = 0.5
    glyphs = rendering.hog_glyphs(weights, side)
    assert glyphs.shape == (2, 3 * side, 4 * side)
    assert glyphs[0].max() == 0
    assert glyphs[1, -side:, -side:].max() == pytest.approx(0.5)
    assert glyphs[1, :-side].max() == glyphs[1, :, :-side].max() == 0
    assert rendering.hog_glyphs(-weights, side).max() == 0


def test_hog_cells_of_a_token_are_drawn_at_their_positions():
    """Only the cell with the bright square has gradients."""
    model = model_for(patch=16, size=(32, 64), mask_ratio=0.5)
    raw = torch.zeros(1, 3, 32, 64)
    raw[..., 18:22, 42:46] = 255  # cell (2, 5) of the 4 x 8 cells of 8 pixels
    rgb = rendering.render_hog(model.target("mim")(raw, raw), model.target("mim"), model.encoder)[0]
    side = rgb.shape[0] // 4
    lit = rgb.amax(-1).unflatten(0, (4, side)).unflatten(2, (8, side)).amax((1, 3)) > 0
    assert lit.nonzero().tolist() == [[2, 5]]


def test_colors_of_hog_cells_are_drawn_behind_the_glyphs():
    model = model_for(patch=16, size=(32, 64), mask_ratio=0.5, mim=HogSettings(color=True))
    raw = torch.zeros(1, 3, 32, 64)
    raw[:, 1, 8:16, 56:] = 255  # cell (1, 7) of the 4 x 8 cells of 8 pixels is green
    target, normalized = model.target("mim"), model.encoder.preprocess.normalize(raw)
    rgb = rendering.render_hog(target(normalized, raw), target, model.encoder)[0]
    side = rgb.shape[0] // 4
    corners = rgb.unflatten(0, (4, side)).unflatten(2, (8, side))[:, 0, :, 0]  # strokes do not reach them
    assert (corners[..., 1] > 0.5).nonzero().tolist() == [[1, 7]]
    assert corners[1, 7].tolist() == pytest.approx([0, 0.6, 0], abs=1e-4)


@pytest.mark.parametrize("chans", [1, 2, 3, 4, 5])
def test_images_of_any_channels_become_rgb(chans):
    images = images_of(chans=chans)
    rgb = rendering.to_rgb(images)
    assert rgb.shape == (2, 32, 32, 3)
    red = images[:, 0] / 255
    assert torch.allclose(rgb[..., 0], red)
    assert torch.allclose(rgb[..., 2], images[:, 2] / 255 if chans >= 3 else red)


@pytest.mark.parametrize(("patch", "size", "chans"), [(4, (16, 32), 1), (8, (32, 32), 3), (16, (64, 48), 5)])
def test_true_pixel_targets_render_the_image(patch, size, chans):
    model = model_for(patch, size, chans, "pixel", "pixel")
    images = images_of(size, chans)
    target = model.target("mim")(model.encoder.preprocess.normalize(images), images)
    rendered = rendering.render_pixels(target, model.encoder, images)
    assert torch.allclose(rendered, rendering.to_rgb(images), atol=1e-4)


def test_exactly_the_masked_tokens_are_gray():
    masked = torch.tensor([[True, False, False, False, False, True]])
    rgb = rendering.gray_out(torch.zeros(1, 8, 12, 3), masked, (2, 3))[0, ..., 0]
    assert (rgb[:4, :4] == rendering.GRAY).all()
    assert (rgb[4:, 8:] == rendering.GRAY).all()
    assert (rgb == rendering.GRAY).sum() == 32


def test_the_heat_map_is_hot_where_values_are_large():
    values = torch.zeros(1, 6)
    values[0, 4] = 7.0  # row 1, column 1 of 2 x 3
    drawn = rendering.heat_map(torch.full((1, 20, 30, 3), 0.5), values, (2, 3))[0]
    colorful = drawn.amax(-1) - drawn.amin(-1)
    assert colorful[15, 15] > 0.5
    assert [side // 10 for side in divmod(int(colorful.argmax()), 30)] == [1, 1]
    assert colorful[:5].max() < 0.01
    flat = rendering.heat_map(torch.full((1, 20, 30, 3), 0.5), torch.ones(1, 6), (2, 3))
    assert flat.isfinite().all()


def test_similar_tokens_have_similar_colors_at_all_positions():
    torch.manual_seed(0)
    positions, kinds = 5 * torch.randn(6, 16), torch.randn(2, 16)
    which = torch.randint(0, 2, (40, 6))
    colors = rendering.component_colors(positions + kinds[which] + 0.01 * torch.randn(40, 6, 16), (2, 3))
    first, second = (colors.view(40, 6, 3)[which == kind][:, 0] for kind in (0, 1))
    assert abs(first.mean() - second.mean()) > 0.3
    assert max(first.std(), second.std()) < 0.1
    assert rendering.component_colors(torch.randn(1, 6, 16), (2, 3)).shape == (1, 2, 3, 3)
