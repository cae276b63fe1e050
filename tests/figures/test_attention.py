"""Attention of the last block, tokens as colors, nearest images: the encoder's own values, drawn in their places."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba

from dmjd.data.sources.registry import open_source
from dmjd.encoders.registry import create_encoder
from dmjd.figures.attention import MOST_HEADS, attention_figure, last_attention
from dmjd.figures.neighbors import NUM_NEIGHBORS, OTHER, SAME, nearest, neighbors_figure
from dmjd.figures.render import component_colors, glow
from dmjd.images.preprocess import Preprocess


def small(name="vit_tiny_patch8", size=(32, 48), chans=3, heads=2, **options):
    torch.manual_seed(0)
    sizes = (
        {"embed_dims": (8, 8, 16), "depths": (1, 1, 2)} if name.startswith("conv") else {"embed_dim": 16, "depth": 2}
    )
    encoder = create_encoder(name, size, chans, num_heads=heads, **sizes, **options).eval()
    encoder.preprocess = Preprocess(size, chans, (0.5,) * chans, (0.25,) * chans)
    return encoder


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("class_token", [False, True])
def test_attention_is_that_of_pytorchs_own_routine(class_token):
    encoder = small(class_token=class_token)
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        received, tokens = last_attention(encoder, images)
        block = encoder.blocks[-1]
        x = block.norm1(encoder.blocks[0](encoder._embed(images, None))).transpose(0, 1)  # N, B, D
        _, weights = F.multi_head_attention_forward(
            *(x, x, x, 16, 2, block.attn.qkv.weight, block.attn.qkv.bias, None, None, False, 0.0),
            *(block.attn.proj.weight, block.attn.proj.bias),
            average_attn_weights=False,
        )  # B, heads, N, N
    prefix = int(class_token)
    torch.testing.assert_close(received, weights[:, :, prefix:, prefix:].mean(2))
    torch.testing.assert_close(tokens, encoder(images)[:, prefix:])
    total = received.sum(-1)
    assert (total < 0.999).all() if class_token else torch.allclose(total, torch.ones(3, 2))
    assert not block._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "size", "chans", "heads"),
    [
        ("vit_tiny_patch8", (32, 48), 5, 8),
        ("conv_vit_tiny_patch8", (48, 32), 1, 2),
        ("conv_vit_tiny_patch4", (16, 16), 3, 2),
    ],
)
def test_attention_figure_has_a_panel_for_each_head_there_is_room_for(name, size, chans, heads):
    encoder = small(name, size, chans, heads).train()
    figure = attention_figure(encoder, torch.randint(0, 256, (5, chans, *size)), num_shown=3)
    shown = min(heads, MOST_HEADS)
    assert len(titles(figure)) == 3 + shown
    assert len(figure.axes) == 3 * (3 + shown)
    assert encoder.training
    assert np.asarray(figure.axes[2].images[0].get_array()).shape == (*size, 3)
    assert ("of 8 heads" in figure.get_supxlabel()) == (heads > MOST_HEADS)


def test_the_image_glows_where_values_are_large():
    values = torch.zeros(1, 6)
    values[0, 4] = 7.0  # row 1, column 1 of 2 x 3
    drawn = glow(torch.full((1, 20, 30, 3), 0.5), values, (2, 3))[0]
    colorful = drawn.amax(-1) - drawn.amin(-1)
    assert colorful[15, 15] > 0.5
    assert [side // 10 for side in divmod(int(colorful.argmax()), 30)] == [1, 1]
    assert colorful[:5].max() < 0.01
    flat = glow(torch.full((1, 20, 30, 3), 0.5), torch.ones(1, 6), (2, 3))
    assert flat.isfinite().all()


def test_tokens_of_one_kind_have_one_color_whatever_their_place():
    torch.manual_seed(0)
    places, kinds = 5 * torch.randn(6, 16), torch.randn(2, 16)
    which = torch.randint(0, 2, (40, 6))
    colors = component_colors(places + kinds[which] + 0.01 * torch.randn(40, 6, 16), (2, 3))
    first, second = (colors.view(40, 6, 3)[which == kind][:, 0] for kind in (0, 1))
    assert abs(first.mean() - second.mean()) > 0.3
    assert max(first.std(), second.std()) < 0.1
    assert component_colors(torch.randn(1, 6, 16), (2, 3)).shape == (1, 2, 3, 3)


def test_nearest_leaves_the_query_itself_out():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, -0.5]])
    cosines, rows = nearest(features, torch.tensor([0, 2]), 3)
    assert rows.tolist() == [[1, 2, 3], [1, 0, 3]]
    torch.testing.assert_close(cosines[0], torch.tensor([20 / 401**0.5, 0.0, -2 / 5**0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("labels", ["folder", "none"])
def test_the_copy_of_a_image_is_its_nearest_neighbor(labels, image_folder, tmp_path):
    for folder in image_folder.iterdir():
        (tmp_path / folder.name).mkdir()
        for path in folder.iterdir():
            shutil.copy(path, tmp_path / folder.name / path.name)
            shutil.copy(path, tmp_path / folder.name / f"{path.stem}-copy.png")
    (tmp_path / "cats" / "broken.png").write_text("no image")
    figure = neighbors_figure(small(), open_source(tmp_path, labels=labels), num_images=3)
    assert titles(figure) == ["query", *(f"neighbor {i + 1}" for i in range(NUM_NEIGHBORS))]
    rows = np.array(figure.axes).reshape(3, 1 + NUM_NEIGHBORS)
    for query, first, *others in rows:
        np.testing.assert_array_equal(*(np.asarray(axes.images[0].get_array()) for axes in (query, first)))
        assert first.get_xlabel().startswith("1.000")
        color = first.spines["top"].get_edgecolor()
        assert (
            (color == to_rgba(SAME) and query.get_xlabel() in ("cats", "dogs"))
            if labels == "folder"
            else (not first.spines["top"].get_visible())
        )
        for axes in others if labels == "folder" else ():
            same = axes.get_xlabel().split()[1] == query.get_xlabel()
            assert axes.spines["top"].get_edgecolor() == to_rgba(SAME if same else OTHER)


def test_neighbors_of_a_part_of_the_set(image_folder, tmp_path):
    source = open_source(image_folder)
    figure = neighbors_figure(small(), source, num_images=9, num_candidates=4)
    assert len(figure.axes) == 4 * 4  # of four images each is a query, and the others are its neighbors
    assert "of 4 images" in figure.get_supxlabel()
    shutil.copy(source.stored(0), tmp_path / "one.png")
    with pytest.raises(ValueError, match="fewer than two"):
        neighbors_figure(small(), open_source(tmp_path))
