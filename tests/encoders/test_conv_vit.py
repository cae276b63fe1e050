"""ConvViT: the visible form equals the dense masked one, stages are feature maps."""

import pytest
import torch
from support import SMALL_CONV_VIT, small_encoder
from torch import nn

from dmjd.encoders import timm_features
from dmjd.encoders.registry import create_encoder
from dmjd.masking import disjoint_masks
from dmjd.model import MaskedImageModel


@pytest.mark.parametrize("patch", [16, 8, 4])
@pytest.mark.parametrize(("grid", "in_chans"), [((3, 5), 1), ((4, 4), 3), ((6, 2), 5)])
def test_conv_vit_visible_form_equals_dense_masked_form(patch, grid, in_chans):
    B, K = 2, 3
    img_size = (grid[0] * patch, grid[1] * patch)
    encoder = small_encoder(f"conv_vit_tiny_patch{patch}", img_size=img_size, in_chans=in_chans)
    images = torch.randn(B, in_chans, *img_size)
    visible = disjoint_masks(B, grid, K, 0.6, keys=torch.arange(B)).visible
    visible = visible.flip(-1)  # any order
    with torch.no_grad():
        tokens, stages = encoder.forward_stages(images, visible.flatten(0, 1))
        assert torch.equal(encoder(images, visible=visible), tokens.unflatten(0, (K, B)))
        for k in range(K):
            expected, expected_stages = encoder.forward_masked_dense(images, visible[k])
            rows = slice(k * B, (k + 1) * B)
            torch.testing.assert_close(tokens[rows], expected, rtol=0, atol=1e-5)
            for stage, expected_stage in zip(stages, expected_stages, strict=True):
                torch.testing.assert_close(stage[rows], expected_stage, rtol=0, atol=1e-5)
    assert [tuple(s.shape[2:]) for s in stages] == [(4, 4, 8), (2, 2, 12)]


def test_a_visible_conv_token_sees_its_visible_neighbors():
    """The depthwise convolution crosses token borders: two neighbors together differ from each alone."""
    encoder = small_encoder("conv_vit_tiny_patch8", img_size=32)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        _, near = encoder.forward_stages(images, torch.tensor([[5, 6]]))
        _, far = encoder.forward_stages(images, torch.tensor([[5, 15]]))
    assert not torch.allclose(near[0][0, 0], far[0][0, 0])


def test_features_only_of_conv_vit():
    torch.manual_seed(0)
    net = create_encoder("conv_vit_tiny_patch16", img_size=64, features_only=True, **SMALL_CONV_VIT)
    assert isinstance(net, timm_features.FeatureGetterNet)
    assert net.feature_info.channels() == [8, 12, 16]
    assert net.feature_info.reduction() == [4, 8, 16]
    maps = net(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6)]


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1), (2,), (-1, 0), None])
def test_conv_vit_feature_backbones_are_pruned_and_exact(indices):
    whole = small_encoder("conv_vit_tiny_patch8", img_size=32)
    torch.manual_seed(0)
    net = create_encoder("conv_vit_tiny_patch8", img_size=32, features_only=True, out_indices=indices, **SMALL_CONV_VIT)
    missing = net.model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    images = torch.randn(2, 3, 32, 32)
    maps = net(images)
    stages = (0, 1, 2) if indices is None else [i % 3 for i in indices]
    with torch.no_grad():
        tokens, (x1, x2) = whole.forward_stages(images)
    output = {0: (x1, 8), 1: (x2, 12), 2: (tokens.view(2, 16, 1, 1, 16), 16)}
    for i, m in zip(stages, maps, strict=True):
        x, width = output[i]
        side = x.shape[2]
        expected = x.view(2, 4, 4, side, side, width).permute(0, 5, 1, 3, 2, 4).reshape(2, width, 4 * side, 4 * side)
        torch.testing.assert_close(m, expected, rtol=0, atol=1e-5)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_conv_vit_intermediates():
    encoder = small_encoder("conv_vit_tiny_patch8", img_size=32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        final, maps = encoder.forward_intermediates(images)
        torch.testing.assert_close(final, encoder.forward_features(images))
        torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), encoder(images))
        _, normed = encoder.forward_intermediates(images, [2], norm=True)
        torch.testing.assert_close(normed[0].flatten(2).transpose(1, 2), final)
        early = encoder.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], maps[0])
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got NLC"):
        encoder.forward_intermediates(images, output_fmt="NLC")


def test_norms_have_their_epsilons():
    model = MaskedImageModel(create_encoder("conv_vit_tiny_patch8", img_size=32, **SMALL_CONV_VIT))
    for key, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            convolutional = key.startswith(("encoder.patch_embed", "encoder.blocks1", "encoder.blocks2"))
            assert module.eps == (1e-5 if convolutional else 1e-6), key
