"""VisionTransformer: equal to timm's in weights, outputs and intermediate maps."""

import pytest
import timm
import torch
from support import SMALL_VIT, small_encoder
from timm.layers import resample_abs_pos_embed
from torch import nn

from dmjd.encoders.registry import create_encoder
from dmjd.interop.conversion import from_timm, timm_arguments
from dmjd.nn.tokens import gather_tokens


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("img_size", "in_chans"), [((32, 32), 3), ((16, 40), 5)])
def test_weights_move_to_timm_and_back(class_token, img_size, in_chans):
    ours = small_encoder("vit_tiny_patch8", img_size=img_size, in_chans=in_chans, class_token=class_token)
    theirs = timm.create_model("vit_tiny_patch16_224", **timm_arguments(ours)).eval()
    assert isinstance(theirs, timm.models.VisionTransformer)
    assert sorted(theirs.state_dict()) == sorted(ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, in_chans, *img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), rtol=0, atol=1e-5)

    torch.manual_seed(1)
    fresh = timm.create_model("vit_tiny_patch16_224", **timm_arguments(ours)).eval()  # positions learned, not fixed
    back = from_timm(fresh)
    ours.load_state_dict(fresh.state_dict(), strict=True)
    with torch.no_grad():
        expected = fresh.forward_features(images)
        torch.testing.assert_close(back.forward_features(images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.forward_features(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates_equal_timms(class_token, norm, output_fmt):
    ours = small_encoder("vit_tiny_patch8", img_size=(16, 24), class_token=class_token)
    theirs = timm.create_model("vit_tiny_patch16_224", **timm_arguments(ours)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 24)
    for indices in (None, 2, [0, -1], (1,)):
        for stop_early in (False, True):
            arguments = {"indices": indices, "norm": norm, "output_fmt": output_fmt, "stop_early": stop_early}
            expected, maps = theirs.forward_intermediates(images, **arguments)
            final, outputs = ours.forward_intermediates(images, **arguments)
            torch.testing.assert_close(final, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(outputs, maps, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
        ours.forward_intermediates(images, output_fmt="NHWC")


def test_vit_visible_form_equals_timm_on_the_kept_patches():
    """Positions are those of the patch in the image, not in the list of visible ones."""
    encoder = small_encoder("vit_tiny_patch8", img_size=32, class_token=True)
    theirs = timm.create_model("vit_tiny_patch16_224", **timm_arguments(encoder)).eval()
    theirs.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[14, 3, 0], [7, 2, 9]])
    with torch.no_grad():
        x = theirs._pos_embed(theirs.patch_embed(images))
        x = torch.cat([x[:, :1], gather_tokens(x[:, 1:], ids)], dim=1)
        torch.testing.assert_close(encoder(images, visible=ids), theirs.blocks(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("indices", "num_blocks"), [((0, 2), 3), ((1,), 2), (2, 3), (None, 3)])
def test_vit_feature_backbones(indices, num_blocks):
    torch.manual_seed(0)
    net = create_encoder(
        "vit_tiny_patch8", img_size=32, class_token=True, features_only=True, out_indices=indices, **SMALL_VIT
    )
    maps = net(torch.randn(2, 3, 24, 32))
    assert len(net.model.blocks) == num_blocks
    assert net.feature_info.channels() == [32] * len(maps)
    assert net.feature_info.reduction() == [8] * len(maps)
    assert all(m.shape == (2, 32, 3, 4) for m in maps)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("grid", [(6, 3), (8, 8), (2, 2)])
def test_learned_positions_are_resized_by_2d_bicubic(grid):
    encoder = small_encoder("vit_tiny_patch8", img_size=(32, 40), class_token=True)
    nn.init.normal_(encoder.pos_embed, std=0.5)
    expected = resample_abs_pos_embed(encoder.pos_embed, list(grid), [4, 5], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.positions(grid), expected, rtol=0, atol=1e-6)
    assert torch.equal(encoder.positions((4, 5)), encoder.pos_embed)
    assert encoder(torch.randn(1, 3, grid[0] * 8, grid[1] * 8)).shape == (1, 1 + grid[0] * grid[1], 32)


def test_prefix_positions_are_zero():
    encoder = small_encoder("vit_tiny_patch8", img_size=32, class_token=True)
    assert not encoder.pos_embed[:, 0].any()
    assert not encoder.pos_embed.requires_grad
