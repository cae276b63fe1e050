"""Behavior of our own encoders: visible tokens, positions, pooling, initialization, stochastic depth."""

import math

import pytest
import torch
from support import SMALL_CONV_VIT, small_encoder
from torch import nn

from dmjd.branches import Distillation, Reconstruction
from dmjd.encoders.base import drop_path_rates
from dmjd.encoders.registry import create_encoder
from dmjd.images.preprocess import Preprocess
from dmjd.masking import DisjointMasks, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.nn.layers import PointwiseConv
from dmjd.nn.tokens import gather_tokens, sincos_positions

BOTH = pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])


@BOTH
def test_images_that_do_not_fit_are_refused(name):
    encoder = small_encoder(name, img_size=32)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        encoder(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="30 x 32 pixels is not divisible by the 8-pixel patch"):
        encoder(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"visible must be \[B, V\] or \[K, B, V\] with B = 2, got \[3, 4\]"):
        encoder(torch.zeros(2, 3, 32, 32), visible=torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "class_token"), [("vit_tiny_patch8", False), ("vit_tiny_patch8", True), ("conv_vit_tiny_patch8", False)]
)
def test_all_tokens_visible_in_any_order_is_the_dense_form(name, class_token):
    encoder = small_encoder(name, img_size=(24, 40), class_token=class_token)
    images = torch.randn(2, 3, 24, 40)
    ids = torch.stack([torch.randperm(15), torch.randperm(15)])
    P = encoder.num_prefix_tokens
    with torch.no_grad():
        dense, visible = encoder(images), encoder(images, visible=ids)
    torch.testing.assert_close(visible[:, P:], gather_tokens(dense[:, P:], ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(visible[:, :P], dense[:, :P], rtol=0, atol=1e-5)


@BOTH
def test_masked_positions_never_influence_visible_ones(name):
    encoder = small_encoder(name, img_size=(32, 48))
    masks = disjoint_masks(2, (4, 6), 2, 0.5, keys=torch.arange(2))
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        before = encoder(images, visible=masks.visible)
        for k in range(2):
            masked = masks.mask[k].view(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
            changed = torch.where(masked, 1e3 * torch.randn_like(images), images)
            assert torch.equal(encoder(changed, visible=masks.visible)[k], before[k])
            if name.startswith("conv"):
                dense = encoder.forward_masked_dense(changed, masks.visible[k])[0]
                torch.testing.assert_close(dense, before[k], rtol=0, atol=1e-5)
        other = torch.where(masked, images, images + 1.0)  # visible pixels do matter
        assert not torch.allclose(encoder(other, visible=masks.visible)[1], before[1])


@BOTH
def test_another_image_size_recomputes_fixed_positions(name):
    encoder, built_for_it = small_encoder(name, img_size=32), small_encoder(name, img_size=(48, 16))
    assert torch.equal(encoder.positions((4, 4)), sincos_positions(encoder.embed_dim, (4, 4)))
    images = torch.randn(2, 3, 48, 16)
    ids = torch.tensor([[0, 7, 11], [3, 5, 10]])
    with torch.no_grad():
        assert torch.equal(encoder(images), built_for_it(images))
        assert torch.equal(encoder(images, visible=ids), built_for_it(images, visible=ids))


@BOTH
def test_pooling_is_the_normed_mean_of_patch_tokens(name):
    encoder = small_encoder(name, img_size=32, **({} if name.startswith("conv") else {"class_token": True}))
    with torch.no_grad():
        tokens = encoder(torch.randn(2, 3, 32, 32))
    P = encoder.num_prefix_tokens
    mean = tokens[:, P:].mean(1)
    centerd = mean - mean.mean(-1, keepdim=True)
    expected = centerd / (centerd.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(encoder.pool(tokens), expected, rtol=1e-5, atol=1e-6)
    tokens[:, :P] += 100.0
    torch.testing.assert_close(encoder.pool(tokens), expected, rtol=1e-5, atol=1e-6)


def test_drop_path_rates_grow_linearly_over_all_blocks():
    assert drop_path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.2, 1) == [0.0]
    encoder = create_encoder("conv_vit_tiny_patch8", img_size=32, drop_path=0.4, **SMALL_CONV_VIT)
    blocks = [*encoder.blocks1, *encoder.blocks2, *encoder.blocks]
    rates = [b.drop_path1.rate for b in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def assert_uniform(weight: torch.Tensor, bound: float, key: str) -> None:
    """Check a uniform distribution in +-bound: nothing outside, edges reached, the right variance."""
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


# ---- torch.compile


@pytest.mark.slow
def test_backward_pass_of_a_compiled_training_step():
    """ "aot_eager" traces it. ``fullgraph`` fails on graph breaks; for the forward pass see test_fake_cuda.py."""
    sizes = {"embed_dims": (4, 4, 8), "depths": (1, 1, 1)}
    torch.manual_seed(0)
    encoder = create_encoder("conv_vit_tiny_patch8", img_size=16, num_heads=2, **sizes)
    model = MaskedImageModel(
        encoder,
        masks=DisjointMasks(mask_ratio=0.5, block_size=1),
        mim=Reconstruction(decoder_dim=8, decoder_depth=1, decoder_heads=2),
        vis=Distillation(projector_dim=8),
    )
    images, raw, keys = torch.randn(2, 3, 16, 16), torch.randint(0, 256, (2, 3, 16, 16)), torch.arange(2)
    losses, gradients = [], []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = step(images, raw, keys=keys)["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_dense_forward_compiles_to_one_graph():
    encoder = create_encoder("conv_vit_tiny_patch8", img_size=16, embed_dims=(4, 4, 8), depths=(1, 1, 1), num_heads=2)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(encoder, fullgraph=True, backend="eager")(images), encoder(images))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_inputs_that_are_no_normalized_images(name):
    encoder = small_encoder(name, img_size=32)
    size = encoder.img_size
    tokens = encoder(torch.ones(0, 3, *size))
    assert tokens.shape == (0, encoder.num_prefix_tokens + encoder.num_patches, encoder.embed_dim)  # an empty batch
    for images in (torch.ones(1, 3, *size, dtype=torch.uint8), torch.ones(1, 3, *size).numpy()):
        with pytest.raises(ValueError, match="images must be a tensor of floats"):
            encoder(images)
    with pytest.raises(ValueError, match="visible must hold integers, got"):
        encoder(torch.ones(1, 3, *size), visible=torch.tensor([[1.0]]))


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_encode_gives_pooled_features_without_gradient_and_leaves_the_mode(name):
    encoder = small_encoder(name, img_size=32)
    images = torch.randn(2, 3, *encoder.img_size)
    expected = encoder.pool(encoder(images))
    features = encoder.encode(images)
    assert expected.requires_grad
    assert not features.requires_grad
    assert torch.equal(features, expected)
    assert features.shape == (2, encoder.embed_dim)
    head = torch.nn.Linear(encoder.embed_dim, 3)
    head(features).sum().backward()  # they are ordinary tensors: a head can be trained on them
    assert encoder.train().encode(images).shape == features.shape
    assert encoder.training


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_invalid_tokens_have_no_weight_in_pooled_features(name):
    encoder = small_encoder(name, img_size=32)
    H, W = encoder.img_size
    P, C = encoder.patch_size, encoder.in_chans
    settings = {"img_size": (H, W), "in_chans": C, "mean": (0.5,) * C, "std": (0.25,) * C}
    images = torch.rand(2, C, H, W, generator=torch.Generator().manual_seed(0))
    holed = images.clone()
    holed[0, :, :P] = float("nan")  # a row of tokens
    encoder.preprocess = Preprocess(**settings)
    assert encoder.valid_tokens(images) is None
    plain = encoder.encode(encoder.preprocess.normalize(255 * images))
    encoder.preprocess = Preprocess(**settings, nodata="auto")
    assert torch.equal(encoder.encode(encoder.preprocess.normalize(255 * images)), plain), "all are valid"
    normalized = encoder.preprocess.normalize(255 * holed)
    valid = encoder.valid_tokens(normalized)
    columns = W // P
    assert valid.tolist() == [
        [False] * columns + [True] * (encoder.num_patches - columns),
        [True] * encoder.num_patches,
    ]
    with torch.no_grad():
        tokens = encoder(normalized)
    mean = tokens[:1, encoder.num_prefix_tokens + columns :].mean(dim=1)
    found = encoder.encode(normalized)
    torch.testing.assert_close(found[:1], nn.functional.layer_norm(mean, mean.shape[1:], eps=1e-6))
    assert torch.equal(found[1], plain[1])
    # An image without a valid token keeps all of them.
    nothing = encoder.preprocess.normalize(torch.full_like(images, float("nan")))
    assert encoder.valid_tokens(nothing).all()
    assert encoder.encode(nothing).isfinite().all()
