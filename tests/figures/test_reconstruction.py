"""Figures of masks, targets and predictions."""

import numpy as np
import pytest
import torch
from figure_models import images_of, model_for, panels, row_labels, words
from matplotlib import colors

import dmjd.figures.render as rendering
from dmjd.encoders.registry import create_encoder
from dmjd.figures.reconstruction import UNNORMALIZED, mask_figure, reconstruction_figure, target_figure
from dmjd.images.preprocess import Preprocess
from dmjd.masking import Masks, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.targets.base import Target


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    ("grid", "size", "chans"), [((4, 4), (32, 32), 3), ((2, 6), (16, 48), 1), ((6, 2), (48, 16), 5)]
)
def test_mask_figure_shows_each_view_and_how_often_tokens_are_masked(views, grid, size, chans):
    masks = disjoint_masks(2, grid, views, 0.5, keys=torch.arange(2))
    columns = panels(mask_figure(images_of(size, chans), masks, grid))
    assert len(columns) == views + 2
    for k, shown in enumerate(list(columns.values())[1:-1]):
        for b in range(2):
            tokens = shown[b][:: size[0] // grid[0], :: size[1] // grid[1]]
            gray = np.isclose(tokens, rendering.GRAY).all(-1)
            assert (gray.ravel() == masks.mask[k, b].numpy()).all()
    heat = columns["times masked"][1][:: size[0] // grid[0], :: size[1] // grid[1], 0].ravel()
    times = masks.mask[:, 1].sum(0).numpy()
    assert (np.argsort(-heat, kind="stable") == np.argsort(times, kind="stable")).all()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("patch", "size", "chans", "target"),
    [(4, (16, 24), 1, "hog"), (8, (32, 32), 3, "hog"), (16, (32, 64), 5, "hog"), (8, (48, 32), 3, "pixel")],
)
def test_reconstruction_figure_has_a_row_for_each_view(views, patch, size, chans, target):
    model = model_for(patch, size, chans, target, target, num_views=views, mask_ratio=0.5)
    figure = reconstruction_figure(model, images_of(size, chans))
    columns = panels(figure)
    assert len(columns) == 5
    assert all(len(rows) == 2 * views for rows in columns.values())
    assert all(np.isfinite(panel).all() for rows in columns.values() for panel in rows)
    assert row_labels(figure) == [f"view {k + 1}" for k in range(views)] * 2 if views > 1 else ["", ""]
    assert (UNNORMALIZED in words(figure)) == (target == "pixel")


def test_predictions_replace_masked_tokens_only():
    model = model_for(mim="pixel", vis="pixel", num_views=2)
    images, masks = images_of(), model.draw_masks(torch.arange(2))
    columns = panels(reconstruction_figure(model, images, masks=masks))
    pasted = columns["reconstruction\nof masked tokens"]
    distilled = columns["distillation\nof visible tokens"]
    truth = rendering.to_rgb(images).numpy()
    for b in range(2):
        for k in range(2):
            masked = rendering.upsample(masks.mask[k], (4, 4), torch.zeros(1, 32, 32, 3))[b].numpy()
            row = 2 * b + k
            assert np.allclose(pasted[row][~masked], truth[b][~masked], atol=1e-4)
            assert not np.allclose(pasted[row][masked], truth[b][masked], atol=0.05)
            assert np.allclose(distilled[row][masked], rendering.GRAY)
            assert not np.allclose(distilled[row][~masked], truth[b][~masked], atol=0.05)


def test_true_hog_tokens_are_tinted():
    model = model_for()
    masks = model.draw_masks(torch.arange(2))
    shown = panels(reconstruction_figure(model, images_of(), masks=masks))["reconstruction\nof masked tokens"][0]
    masked = rendering.upsample(masks.mask[0], (4, 4), torch.zeros(1, *shown.shape))[0].numpy()
    hue = colors.rgb_to_hsv(np.clip(shown, 0, 1))
    lit = shown.max(-1) > 0.05
    assert (abs(hue[lit & ~masked][:, 0] - 0.615) < 0.02).all()


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({"vis": None}, ["target 'hog'\nof mim", "reconstruction\nof masked tokens"]),
        ({"mim": None}, ["target 'hog'\nof vis", "distillation\nof visible tokens"]),
        (
            {"mim": "pixel", "vis": "hog"},
            [
                "target 'pixel'\nof mim",
                "reconstruction\nof masked tokens",
                "target 'hog'\nof vis",
                "distillation\nof visible tokens",
            ],
        ),
    ],
)
def test_only_active_branches_are_shown(options, titles):
    columns = panels(reconstruction_figure(model_for(**options), images_of()))
    assert list(columns) == ["image", "visible tokens", *titles]


def test_given_masks_are_shown():
    masks = Masks.from_visible(torch.tensor([[[0, 5], [1, 2]]]), num_tokens=16)
    columns = panels(reconstruction_figure(model_for(), images_of(), masks=masks))
    assert (columns["visible tokens"][1] != rendering.GRAY).any(-1).mean() == pytest.approx(2 / 16, abs=0.01)


class Edges(Target):
    """A target that is not part of the package."""

    name, dim = "edges", 5

    def forward(self, normalized, raw):
        tokens = torch.nn.functional.avg_pool2d(raw.float(), 8).flatten(2).transpose(1, 2)
        return torch.cat([tokens, tokens[..., :2] ** 2], dim=-1)


def test_a_new_target_is_shown_by_its_principal_components():
    edges = Edges()
    figure = reconstruction_figure(model_for(mim=edges, vis=edges), images_of())
    assert "principal components" in words(figure)
    assert panels(figure)["target 'edges'"][0].shape == (4, 4, 3)


def test_figures_do_not_change_the_model():
    model = model_for().train()
    model.branches["mim"].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    reconstruction_figure(model, images_of())
    target_figure(model, images_of())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    images = images_of()
    model(model.encoder.preprocess.normalize(images), images.float())["loss"].backward()  # can still be trained


def test_conv_vit_models_are_drawn_too():
    torch.manual_seed(0)
    encoder = create_encoder("conv_vit_tiny_patch8", 32, embed_dims=(16, 32, 48), depths=(1, 1, 1), num_heads=3)
    encoder.preprocess = Preprocess((32, 32))
    model = MaskedImageModel(encoder)
    assert len(panels(reconstruction_figure(model, images_of()))) == 5
