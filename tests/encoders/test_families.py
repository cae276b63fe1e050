"""Encoders: equal to timm where timm has them, visible form equal to the dense masked one, files that round-trip."""

import copy
import json
import math

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models._features import FeatureGetterNet
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dmjd.encoders.base import drop_path_rates
from dmjd.encoders.registry import create_encoder, encoder_names
from dmjd.encoders.weights import encoder_bytes, load_encoder
from dmjd.images.preprocess import Preprocess
from dmjd.interop.conversion import from_timm, timm_arguments
from dmjd.masking import disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.nn.layers import PointwiseConv
from dmjd.nn.tokens import gather_tokens, sincos_positions

torch.set_num_threads(2)
SMALL_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SMALL_CONV = {"embed_dims": (8, 12, 16), "depths": (2, 1, 2), "num_heads": 2}


def small(name: str, seed: int = 0, **options):
    """A small encoder whose every parameter is random, norms and positions apart."""
    torch.manual_seed(seed)
    encoder = create_encoder(name, **(SMALL_CONV if name.startswith("conv") else SMALL_VIT), **options)
    for key, parameter in encoder.named_parameters():
        if key != "pos_embed" and parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in key and key.endswith("weight")), std=0.2)
    return encoder.eval()


BOTH = pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])


# ---- names and sizes


@pytest.mark.parametrize("name", encoder_names())
def test_every_name_builds(name):
    side = int(name.rpartition("patch")[2]) * 2
    with torch.device("meta"):
        encoder = create_encoder(name, img_size=(side, 2 * side))
    widths = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
    assert encoder.embed_dim == widths[name.split("_")[-2]]
    assert (encoder.name, encoder.grid, encoder.patch_size, encoder.in_chans) == (name, (2, 4), side // 2, 3)
    depth = {"vit": (12, 24), "conv": (11, 23)}[name.split("_")[0]]["large" in name]
    assert len(encoder.blocks) == depth
    assert encoder.decoder_mlp_ratio == (8 if name.startswith("conv") else 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tny_patch16", {}, "did you mean 'vit_tiny_patch16'"),
        ("conv_vit_huge_patch16", {}, "unknown encoder 'conv_vit_huge_patch16'; did you mean"),
        ("vit_tiny_patch0", {}, "unknown encoder"),
        ("resnet50", {}, "unknown encoder"),
        ("conv_vit_tiny_patch14", {}, "patch 4, 8 or 16, got 14"),
        ("conv_vit_tiny_patch16", {"class_token": True}, "no class token"),
        ("vit_tiny_patch16", {"embed_dims": (1, 2, 3)}, "does not take embed_dims; it takes .*embed_dim"),
        ("vit_tiny_patch16", {"patch_size": 8}, "does not take patch_size"),
        ("vit_tiny_patch16", {"img_size": 30}, "30 x 30 is not divisible .* nearest that is: 32 x 32"),
        ("vit_tiny_patch16", {"img_size": 0}, "not divisible"),
        ("vit_tiny_patch16", {"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ("vit_tiny_patch16", {"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ("vit_tiny_patch16", {"embed_dim": 64}, "3 attention heads do not divide the width 64"),
        ("vit_tiny_patch16", {"embed_dim": 30}, "divisible by 4"),
    ],
)
def test_what_cannot_be_built_says_why(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_encoder(name, **{"img_size": 32} | options)


@BOTH
def test_images_that_do_not_fit_are_refused(name):
    encoder = small(name, img_size=32)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        encoder(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="30 x 32 pixels is not divisible by the 8-pixel patch"):
        encoder(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"visible must be \[B, V\] or \[K, B, V\] with B = 2, got \[3, 4\]"):
        encoder(torch.zeros(2, 3, 32, 32), visible=torch.zeros(3, 4, dtype=torch.long))


# ---- timm


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("img_size", "in_chans"), [((32, 32), 3), ((16, 40), 5)])
def test_weights_move_to_timm_and_back(class_token, img_size, in_chans):
    ours = small("vit_tiny_patch8", img_size=img_size, in_chans=in_chans, class_token=class_token)
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
    ours = small("vit_tiny_patch8", img_size=(16, 24), class_token=class_token)
    theirs = timm.create_model("vit_tiny_patch16_224", **timm_arguments(ours)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 24)
    for indices in (None, 2, [0, -1], (1,)):
        for stop_early in (False, True):
            arguments = {"indices": indices, "norm": norm, "output_fmt": output_fmt, "stop_early": stop_early}
            expected, maps = theirs.forward_intermediates(images, **arguments)
            final, found = ours.forward_intermediates(images, **arguments)
            torch.testing.assert_close(final, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(found, maps, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
        ours.forward_intermediates(images, output_fmt="NHWC")


# ---- visible tokens only


@pytest.mark.parametrize("patch", [16, 8, 4])
@pytest.mark.parametrize(("grid", "in_chans"), [((3, 5), 1), ((4, 4), 3), ((6, 2), 5)])
def test_conv_vit_visible_form_equals_dense_masked_form(patch, grid, in_chans):
    B, K = 2, 3
    img_size = (grid[0] * patch, grid[1] * patch)
    encoder = small(f"conv_vit_tiny_patch{patch}", img_size=img_size, in_chans=in_chans)
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
            for found, wanted in zip(stages, expected_stages, strict=True):
                torch.testing.assert_close(found[rows], wanted, rtol=0, atol=1e-5)
    assert [tuple(s.shape[2:]) for s in stages] == [(4, 4, 8), (2, 2, 12)]


@pytest.mark.parametrize(
    ("name", "class_token"), [("vit_tiny_patch8", False), ("vit_tiny_patch8", True), ("conv_vit_tiny_patch8", False)]
)
def test_all_tokens_visible_in_any_order_is_the_dense_form(name, class_token):
    encoder = small(name, img_size=(24, 40), class_token=class_token)
    images = torch.randn(2, 3, 24, 40)
    ids = torch.stack([torch.randperm(15), torch.randperm(15)])
    P = encoder.num_prefix_tokens
    with torch.no_grad():
        dense, found = encoder(images), encoder(images, visible=ids)
    torch.testing.assert_close(found[:, P:], gather_tokens(dense[:, P:], ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, :P], dense[:, :P], rtol=0, atol=1e-5)


def test_vit_visible_form_equals_timm_on_the_kept_patches():
    """Positions belong to the place of a patch in the image, not in the list."""
    encoder = small("vit_tiny_patch8", img_size=32, class_token=True)
    theirs = timm.create_model("vit_tiny_patch16_224", **timm_arguments(encoder)).eval()
    theirs.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[14, 3, 0], [7, 2, 9]])
    with torch.no_grad():
        x = theirs._pos_embed(theirs.patch_embed(images))
        x = torch.cat([x[:, :1], gather_tokens(x[:, 1:], ids)], dim=1)
        torch.testing.assert_close(encoder(images, visible=ids), theirs.blocks(x), rtol=0, atol=1e-5)


@BOTH
def test_masked_positions_never_influence_visible_ones(name):
    encoder = small(name, img_size=(32, 48))
    masks = disjoint_masks(2, (4, 6), 2, 0.5, keys=torch.arange(2))
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        before = encoder(images, visible=masks.visible)
        for k in range(2):
            hidden = masks.mask[k].view(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
            shaken = torch.where(hidden, 1e3 * torch.randn_like(images), images)
            assert torch.equal(encoder(shaken, visible=masks.visible)[k], before[k])
            if name.startswith("conv"):
                dense = encoder.forward_masked_dense(shaken, masks.visible[k])[0]
                torch.testing.assert_close(dense, before[k], rtol=0, atol=1e-5)
        other = torch.where(hidden, images, images + 1.0)  # and visible pixels do matter
        assert not torch.allclose(encoder(other, visible=masks.visible)[1], before[1])


def test_a_visible_conv_token_sees_its_visible_neighbors():
    """The depthwise convolution crosses token borders: two neighbors together differ from each alone."""
    encoder = small("conv_vit_tiny_patch8", img_size=32)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        _, near = encoder.forward_stages(images, torch.tensor([[5, 6]]))
        _, far = encoder.forward_stages(images, torch.tensor([[5, 15]]))
    assert not torch.allclose(near[0][0, 0], far[0][0, 0])


# ---- feature maps, sizes, positions


def test_features_only_of_conv_vit():
    torch.manual_seed(0)
    net = create_encoder("conv_vit_tiny_patch16", img_size=64, features_only=True, **SMALL_CONV)
    assert isinstance(net, FeatureGetterNet)
    assert net.feature_info.channels() == [8, 12, 16]
    assert net.feature_info.reduction() == [4, 8, 16]
    maps = net(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6)]


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1), (2,), (-1, 0), None])
def test_conv_vit_feature_backbones_are_pruned_and_exact(indices):
    whole = small("conv_vit_tiny_patch8", img_size=32)
    torch.manual_seed(0)
    net = create_encoder("conv_vit_tiny_patch8", img_size=32, features_only=True, out_indices=indices, **SMALL_CONV)
    missing = net.model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    images = torch.randn(2, 3, 32, 32)
    found = net(images)
    wanted = (0, 1, 2) if indices is None else [i % 3 for i in indices]
    with torch.no_grad():
        tokens, (x1, x2) = whole.forward_stages(images)
    stage = {0: (x1, 8), 1: (x2, 12), 2: (tokens.view(2, 16, 1, 1, 16), 16)}
    for i, m in zip(wanted, found, strict=True):
        x, width = stage[i]
        side = x.shape[2]
        expected = x.view(2, 4, 4, side, side, width).permute(0, 5, 1, 3, 2, 4).reshape(2, width, 4 * side, 4 * side)
        torch.testing.assert_close(m, expected, rtol=0, atol=1e-5)
    sum(m.square().mean() for m in found).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(("indices", "kept"), [((0, 2), 3), ((1,), 2), (2, 3), (None, 3)])
def test_vit_feature_backbones(indices, kept):
    torch.manual_seed(0)
    net = create_encoder(
        "vit_tiny_patch8", img_size=32, class_token=True, features_only=True, out_indices=indices, **SMALL_VIT
    )
    maps = net(torch.randn(2, 3, 24, 32))
    assert len(net.model.blocks) == kept
    assert net.feature_info.channels() == [32] * len(maps)
    assert net.feature_info.reduction() == [8] * len(maps)
    assert all(m.shape == (2, 32, 3, 4) for m in maps)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_conv_vit_intermediates():
    encoder = small("conv_vit_tiny_patch8", img_size=32)
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


@BOTH
def test_another_image_size_recomputes_fixed_positions(name):
    encoder, built_for_it = small(name, img_size=32), small(name, img_size=(48, 16))
    assert torch.equal(encoder.positions((4, 4)), sincos_positions(encoder.embed_dim, (4, 4)))
    images = torch.randn(2, 3, 48, 16)
    ids = torch.tensor([[0, 7, 11], [3, 5, 10]])
    with torch.no_grad():
        assert torch.equal(encoder(images), built_for_it(images))
        assert torch.equal(encoder(images, visible=ids), built_for_it(images, visible=ids))


@pytest.mark.parametrize("grid", [(6, 3), (8, 8), (2, 2)])
def test_learned_positions_are_resized_by_2d_bicubic(grid):
    encoder = small("vit_tiny_patch8", img_size=(32, 40), class_token=True)
    nn.init.normal_(encoder.pos_embed, std=0.5)
    expected = resample_abs_pos_embed(encoder.pos_embed, list(grid), [4, 5], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.positions(grid), expected, rtol=0, atol=1e-6)
    assert torch.equal(encoder.positions((4, 5)), encoder.pos_embed)
    assert encoder(torch.randn(1, 3, grid[0] * 8, grid[1] * 8)).shape == (1, 1 + grid[0] * grid[1], 32)


def test_prefix_positions_are_zero():
    encoder = small("vit_tiny_patch8", img_size=32, class_token=True)
    assert not encoder.pos_embed[:, 0].any()
    assert not encoder.pos_embed.requires_grad


@BOTH
def test_pooling_is_the_normed_mean_of_patch_tokens(name):
    encoder = small(name, img_size=32, **({} if name.startswith("conv") else {"class_token": True}))
    with torch.no_grad():
        tokens = encoder(torch.randn(2, 3, 32, 32))
    P = encoder.num_prefix_tokens
    mean = tokens[:, P:].mean(1)
    centerd = mean - mean.mean(-1, keepdim=True)
    expected = centerd / (centerd.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(encoder.pool(tokens), expected, rtol=1e-5, atol=1e-6)
    tokens[:, :P] += 100.0
    torch.testing.assert_close(encoder.pool(tokens), expected, rtol=1e-5, atol=1e-6)


# ---- training machinery


def test_drop_path_rates_grow_linearly_over_all_blocks():
    assert drop_path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.2, 1) == [0.0]
    encoder = create_encoder("conv_vit_tiny_patch8", img_size=32, drop_path=0.4, **SMALL_CONV)
    blocks = [*encoder.blocks1, *encoder.blocks2, *encoder.blocks]
    rates = [getattr(getattr(b, "drop_path", getattr(b, "drop_path1", None)), "drop_prob", 0.0) for b in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@BOTH
def test_drop_path_acts_in_training_only(name):
    images = torch.randn(8, 3, 32, 32)
    encoder = small(name, img_size=32, drop_path=0.5)
    plain = small(name, img_size=32)
    with torch.no_grad():
        assert torch.equal(encoder(images), plain(images))
        encoder.train()
        plain.train()
        assert not torch.equal(encoder(images), encoder(images))
        assert torch.equal(plain(images), plain(images))


@BOTH
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name):
    plain = small(name, img_size=32)
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    kept = []
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 9], [1, 2, 15]])
    for encoder in (plain, thrifty):
        storages = {}
        with saved_tensors_hooks(lambda t, s=storages: s.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            maps = encoder.forward_intermediates(images, [1], intermediates_only=True)
            loss = encoder(images).square().mean() + encoder(images, visible=ids).square().mean()
            loss = loss + maps[0].square().mean()
        kept.append(sum(storages.values()))
        loss.backward()
    assert kept[1] < 0.7 * kept[0]
    for (key, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        if a.requires_grad and key not in ("norm.weight", "norm.bias"):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=key)


# ---- initialization (method, section 5)


def assert_uniform(weight: torch.Tensor, bound: float, key: str) -> None:
    """Uniform in +-bound: nothing outside, the edges reached, the right variance."""
    n = weight.numel()
    assert weight.abs().max() <= bound * (1 + 1e-6), key
    assert weight.abs().max() > bound * (1 - 20 / n), key
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(n)), key


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "conv_vit_tiny_patch16"])
def test_initialization(name):
    torch.manual_seed(0)
    depth = {"depths": (1, 1, 1)} if name.startswith("conv") else {"depth": 1, "class_token": True}
    model = MaskedImageModel(create_encoder(name, img_size=64, **depth))
    xavier_convs = {"encoder.patch_embed3.proj" if name.startswith("conv") else "encoder.patch_embed.proj"}
    seen = set()
    for key, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            assert (module.weight == 1).all(), key
            assert (module.bias == 0).all(), key
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight.detach()
        fan_out, fan_in = weight.flatten(1).shape
        convolution = isinstance(module, nn.Conv2d | PointwiseConv)
        kind = "xavier" if not convolution or key in xavier_convs else "default"
        seen.add((convolution, kind))
        bound = math.sqrt(6 / (fan_in + fan_out)) if kind == "xavier" else 1 / math.sqrt(fan_in)
        assert_uniform(weight, bound, key)
        if convolution:
            assert_uniform(module.bias.detach(), 1 / math.sqrt(fan_in), key)
        else:
            assert not module.bias.any(), key
    assert seen == {(False, "xavier"), (True, "xavier")} | ({(True, "default")} if name.startswith("conv") else set())
    tokens = [model.branches["mim"].decoder.mask_token] + ([] if name.startswith("conv") else [model.encoder.cls_token])
    for token in tokens:
        assert token.std().item() == pytest.approx(0.02, rel=0.25)
        assert abs(token.mean().item()) < 0.006


def test_norms_have_their_epsilons():
    model = MaskedImageModel(create_encoder("conv_vit_tiny_patch8", img_size=32, **SMALL_CONV))
    for key, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            convolutional = key.startswith(("encoder.patch_embed", "encoder.blocks1", "encoder.blocks2"))
            assert module.eps == (1e-5 if convolutional else 1e-6), key


# ---- files


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch8", {"class_token": True, "in_chans": 5, "mlp_ratio": 2.0}),
        ("conv_vit_tiny_patch4", {"in_chans": 1, "mlp_ratios": (4.0, 4.0, 2.0)}),
    ],
)
def test_encoder_file_round_trip(name, options, tmp_path):
    encoder = small(name, img_size=(16, 24), drop_path=0.1, **options)
    encoder.preprocess = Preprocess(
        (16, 24), options["in_chans"], (0.5,) * options["in_chans"], (0.25,) * options["in_chans"]
    )
    data = encoder_bytes(encoder)
    assert data == encoder_bytes(encoder)
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(data)
    with safe_open(file, "pt") as opened:
        assert list(opened.metadata()) == ["dmjd"]
        metadata = json.loads(opened.metadata()["dmjd"])
        assert opened.metadata()["dmjd"] == json.dumps(metadata, sort_keys=True)
        assert set(opened.keys()) == set(encoder.state_dict())
    for source in (file, str(file), tmp_path):
        loaded = load_encoder(source)
        assert not loaded.training
        assert loaded.preprocess == encoder.preprocess
        assert encoder_bytes(loaded) == data
        images = torch.randn(1, options["in_chans"], 16, 24)
        with torch.no_grad():
            assert torch.equal(loaded(images), encoder(images))


def test_encoder_file_does_not_depend_on_drop_path():
    assert encoder_bytes(small("vit_tiny_patch8", img_size=16, drop_path=0.3)) == encoder_bytes(
        small("vit_tiny_patch8", img_size=16)
    )


@pytest.mark.parametrize(
    ("name", "options", "indices"),
    [("vit_tiny_patch8", {"class_token": True}, (0, 1)), ("conv_vit_tiny_patch4", {}, (0, 1, 2))],
)
def test_a_trained_encoder_as_a_frozen_backbone(name, options, indices, tmp_path):
    """What libraries ask of a timm backbone (feature_info, a list of maps), inside somebody's own training step."""
    encoder = small(name, img_size=(16, 24), **options)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    backbone = load_encoder(tmp_path, features_only=True, out_indices=indices)
    assert not any(module.training for module in backbone.modules())
    backbone.requires_grad_(False)
    images = torch.randn(2, 3, 16, 24)
    maps = backbone(images)
    expected = encoder.forward_intermediates(images, indices=indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    for features, width, reduction in zip(
        maps, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert features.shape == (2, width, 16 // reduction, 24 // reduction)
    head = nn.Conv2d(maps[-1].shape[1], 2, 1)
    head(maps[-1]).mean().backward()
    assert head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_trained_encoder_in_anyones_loop(tmp_path):
    encoder = small("vit_tiny_patch8", img_size=16)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    loaded = load_encoder(tmp_path)
    assert (loaded.embed_dim, loaded.patch_size, loaded.grid) == (encoder.embed_dim, 8, (2, 2))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    tokens, maps = loaded.forward_intermediates(images)
    assert torch.equal(tokens, loaded.forward_features(images))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), loaded(images))
    model = nn.Sequential(loaded.train(), nn.Flatten(), nn.Linear(4 * loaded.embed_dim, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_load_encoder_by_name():
    encoder = load_encoder("vit_tiny_patch32")
    assert (encoder.name, encoder.img_size, encoder.training) == ("vit_tiny_patch32", (224, 224), False)
    with pytest.raises(ValueError, match="did you mean 'vit_tiny_patch32'"):
        load_encoder("vit_tinny_patch32")


def test_load_encoder_errors(tmp_path):
    def refused(source, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_encoder(source)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "nowhere does not exist: give a run folder")
    refused(tmp_path, "holds no encoder.safetensors: it is no run folder")
    (tmp_path / "text.safetensors").write_text("not weights")
    refused(tmp_path / "text.safetensors", "not a readable safetensors file .* may be cut short")
    encoder = small("vit_tiny_patch8", img_size=16)
    whole = encoder_bytes(encoder)
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.safetensors", "cut short")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(tmp_path / "empty.safetensors", "cut short")
    save_file(encoder.state_dict(), tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "not written by dmjd; .*load_official")
    with safe_open(tmp_path / "foreign.safetensors", "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    (tmp_path / "good.safetensors").write_bytes(whole)
    with safe_open(tmp_path / "good.safetensors", "pt") as opened:
        metadata = json.loads(opened.metadata()["dmjd"])
    state.pop("norm.bias")
    save_file(state, tmp_path / "lacking.safetensors", {"dmjd": json.dumps(metadata)})
    refused(tmp_path / "lacking.safetensors", "weights do not fit vit_tiny_patch8: .*norm.bias")
    save_file(state, tmp_path / "newer.safetensors", {"dmjd": json.dumps(metadata | {"format": 99})})
    refused(tmp_path / "newer.safetensors", r"newer dmjd \(format 99\)")
