"""What every encoder does, whichever family it belongs to: our own, and each kind of timm's vision transformers."""

import copy
import re
from functools import partial

import pytest
import timm
import torch
from support import SMALL_CONV_VIT, SMALL_VIT
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmjd.branches import Distillation, Reconstruction
from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import create_encoder, resized
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import ENCODER_FILE, load_encoder
from dmjd.engine.layer_decay import layer_groups
from dmjd.evaluation.frozen.linear_sweep import SweepFeatures
from dmjd.evaluation.supervised.pyramid import Pyramid
from dmjd.figures.attention import last_attention
from dmjd.masking import DisjointMasks, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.nn.dropout import set_row_keys
from dmjd.nn.tokens import gather_tokens

OURS = ("vit_tiny_patch8", "conv_vit_tiny_patch8")
# One of each kind: what it has besides the parts of our ViT.
TIMM = {
    "timm/vit_tiny_patch16_224": "class token with a position",
    "timm/vit_small_patch14_reg4_dinov2": "registers without positions, layer scale",
    "timm/vit_small_patch16_dinov3": "rotary positions only",
    "timm/eva02_tiny_patch14_224": "rotary and learned positions, SwiGLU",
    "timm/vit_small_patch16_rope_mixed_ape_224": "rotary positions of each block and head",
    "timm/vit_base_patch32_clip_224": "norm before the blocks",
    "timm/aimv2_large_patch14_224": "RMS norms, no class token",
    "timm/vit_dwee_patch16_reg1_gap_256": "two attentions in a block",
    "timm/vit_pwee_patch16_reg1_gap_256": "attention and MLP side by side",
    "timm/test_vit4": "normalized queries and keys",
}

EVERY = pytest.mark.parametrize("name", [*OURS, *(name for name in TIMM if timm.is_model(name.removeprefix("timm/")))])
GRID = (2, 3)


def patch_of(name: str) -> int:
    match = re.search(r"patch(\d+)", name)
    return int(match[1]) if match else 16


def small(name: str, grid: tuple[int, int] = GRID, **options) -> Encoder:
    """A small encoder in which all weights matter, in evaluation mode."""
    torch.manual_seed(0)
    sizes = SMALL_CONV_VIT if name.startswith("conv") else SMALL_VIT
    encoder = create_encoder(name, img_size=tuple(patch_of(name) * side for side in grid), **sizes | options).eval()
    for key, parameter in encoder.named_parameters():
        if key != "pos_embed":
            nn.init.normal_(parameter, mean=float("norm" in key and key.endswith("weight")), std=0.2)
    return encoder


def images_for(encoder: Encoder, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, encoder.in_chans, *encoder.img_size, generator=torch.Generator().manual_seed(batch))


close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@EVERY
@torch.no_grad()
def test_all_tokens_visible_in_any_order_is_the_dense_form(name):
    encoder = small(name, in_chans=2)
    images, P = images_for(encoder), encoder.num_prefix_tokens
    ids = torch.stack([torch.randperm(6), torch.randperm(6)])
    dense, visible = encoder(images), encoder(images, visible=ids)
    assert dense.shape == (2, P + 6, encoder.embed_dim)
    close(visible[:, P:], gather_tokens(dense[:, P:], ids))
    close(visible[:, :P], dense[:, :P])
    close(encoder(images, visible=ids.expand(3, -1, -1))[2], visible)


@EVERY
@torch.no_grad()
def test_masked_positions_never_influence_visible_ones_but_places_do(name):
    encoder = small(name, (4, 6))
    P, masks = patch_of(name), disjoint_masks(2, (4, 6), 2, 0.5, keys=torch.arange(2))
    images = images_for(encoder)
    before = encoder(images, visible=masks.visible)
    masked = masks.mask[1].view(2, 1, 4, 6).repeat_interleave(P, 2).repeat_interleave(P, 3)
    changed = torch.where(masked, 1e3 * torch.randn_like(images), images)
    assert torch.equal(encoder(changed, visible=masks.visible)[1], before[1])
    other = torch.where(masked, images, images + torch.randn_like(images))
    assert not torch.allclose(encoder(other, visible=masks.visible)[1], before[1])
    # The same pixels at other places of the image give other tokens: positions follow the ids.
    blank, ids = torch.zeros_like(images), torch.tensor([[0, 7, 23]] * 2)
    here, there = encoder(blank, visible=ids), encoder(blank, visible=torch.tensor([[9, 2, 11]] * 2))
    prefix = encoder.num_prefix_tokens
    assert not torch.allclose(here[:, prefix:], there[:, prefix:], atol=1e-3)


@EVERY
@torch.no_grad()
def test_copies_for_another_image_size_compute_what_the_encoder_does(name):
    encoder = small(name)
    copied = resized(encoder, tuple(patch_of(name) * side for side in (4, 3)))
    images = images_for(copied)
    assert copied.grid == (4, 3)
    close(copied(images), encoder(images))
    ids = torch.tensor([[0, 7, 11], [3, 5, 10]])
    close(copied(images, visible=ids), encoder(images, visible=ids))


@EVERY
@torch.no_grad()
def test_maps_are_those_of_the_blocks(name):
    encoder = small(name)
    images, P = images_for(encoder), encoder.num_prefix_tokens
    last = encoder(images)[:, P:]
    outputs = encoder.block_outputs(images, encoder.depth)
    assert len(outputs) == encoder.depth == len(encoder.blocks)
    assert torch.equal(outputs[-1], last)
    final, maps = encoder.forward_intermediates(images, norm=True)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in encoder.feature_info]
    close(maps[-1], encoder.norm(encoder(images))[:, P:].transpose(1, 2).unflatten(2, GRID))
    close(final[:, P:], maps[-1].flatten(2).transpose(1, 2))
    tokens = encoder(images)
    pooled = encoder.pool(tokens)
    tokens[:, :P] += 100.0
    close(encoder.pool(tokens), pooled)
    close(pooled, nn.functional.layer_norm(last.mean(1), (encoder.embed_dim,), eps=1e-6))


@EVERY
def test_backbones_and_pyramids_train_all_that_they_use(name):
    torch.manual_seed(0)
    options = {"img_size": tuple(2 * patch_of(name) * side for side in GRID)}
    sizes = SMALL_CONV_VIT if name.startswith("conv") else SMALL_VIT
    net = create_encoder(name, **options, **sizes, features_only=True, out_indices=(0, 1))
    maps = net(torch.randn(2, 3, *options["img_size"]))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)

    pyramid = Pyramid(create_encoder(name, **options, **sizes))
    maps = pyramid(torch.randn(2, 3, *options["img_size"]))
    assert [len(m) for m in maps] == [2] * 4
    groups = layer_groups(pyramid, 0.05, 0.5)
    assert len({group["lr_scale"] for group in groups}) == pyramid.encoder.depth + 2


@EVERY
def test_parameters_have_layers(name):
    encoder = small(name)
    layers: dict[int, set[str]] = {}
    for key, _ in encoder.named_parameters():
        layers.setdefault(encoder.layer_of(key), set()).add(key.split(".")[0])
    assert sorted(layers) == list(range(encoder.depth + 1))
    assert all(layers[i] == {"blocks"} for i in range(1, encoder.depth + 1))
    assert encoder.layer_of("blocks.1.attn.qkv.weight") == 2
    known = {key for key, _ in encoder.named_parameters()}
    assert {"pos_embed", "cls_token"} & known <= encoder.no_weight_decay() | {"cls_token"}


@EVERY
def test_stochastic_depth_is_drawn_from_keys_and_in_training_only(name):
    encoder, plain = small(name, drop_path=0.5), small(name)
    images, keys = images_for(encoder, 4), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(encoder(images), plain(images))
        encoder.train()
        set_row_keys(encoder, keys)
        whole = encoder(images)
        assert not torch.allclose(whole, plain(images))
        for i in range(4):
            set_row_keys(encoder, keys[i : i + 1])
            torch.testing.assert_close(encoder(images[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-4)
        assert torch.equal(plain.train()(images), plain(images))


@EVERY
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name):
    plain = small(name, (4, 4), drop_path=0.5).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    saved, images = [], images_for(plain)
    for encoder in (plain, checkpointed):
        storages: dict[int, int] = {}
        with saved_tensors_hooks(lambda t, s=storages: s.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            set_row_keys(encoder, torch.arange(2))
            loss = encoder(images).square().mean()
        weights = sum(p.nbytes for p in encoder.parameters())
        saved.append(sum(storages.values()))
        loss.backward()
    assert saved[1] < 0.8 * saved[0] + weights
    for (key, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=key)
    with torch.no_grad():  # no keys of this pass are left for the next
        assert not torch.equal(checkpointed(images), checkpointed(images))


@EVERY
@torch.no_grad()
def test_flops_are_what_runs(name):
    encoder = create_encoder(name, img_size=tuple(patch_of(name) * side for side in (4, 6)), **_wide(name)).eval()
    images, ids = torch.randn(1, 3, *encoder.img_size), torch.randperm(24)[:9].view(1, 9)
    for visible in (None, ids):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder(images, visible=visible)
        expected = counter.get_total_flops()
        assert encoder.flops(None if visible is None else 9) == pytest.approx(expected, rel=0.05)


def _wide(name: str) -> dict:
    if name.startswith("conv"):
        return {"embed_dims": (32, 64, 96), "depths": (1, 1, 2), "num_heads": 2}
    return {"embed_dim": 96, "depth": 2, "num_heads": 2}


@EVERY
@torch.no_grad()
def test_attention_maps_are_those_of_the_last_block(name):
    encoder = small(name)
    images, P = images_for(encoder), encoder.num_prefix_tokens
    received, tokens = last_attention(encoder, images)
    close(tokens, encoder(images)[:, P:])
    attentions = 2 if "dwee" in name else 1
    assert received.shape == (2, attentions * SMALL_VIT["num_heads"], 6)
    total = received.sum(-1)
    assert (total < 0.999).all() if P else torch.allclose(total, torch.ones_like(total))

    attention = getattr(encoder.blocks[-1], "attn", None)
    if type(attention).__name__ not in ("EvaAttention", "AttentionRope"):
        return
    weights: list[torch.Tensor] = []  # timm's own, which it computes if the fused form is off
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda *call: weights.append(call[-1]))
    encoder(images)
    close(received, weights[0][:, :, P:, P:].mean(2))


@pytest.mark.parametrize(
    ("name", "class_token"), [("timm/vit_tiny_patch16_224", True), ("timm/vit_pwee_patch16_reg1_gap_256", False)]
)
def test_a_register_is_not_probed_as_a_class_token(name, class_token):
    encoder = small(name)
    sweep = SweepFeatures(encoder)
    with torch.no_grad():
        features = sweep(images_for(encoder))
    assert any("class token" in part for part in sweep.parts) == class_token
    assert features.shape == (2, len(sweep.parts) * encoder.embed_dim)


@EVERY
@torch.no_grad()
def test_files_load_as_the_same_encoder(name, tmp_path):
    encoder = small(name, in_chans=1, drop_path=0.1)
    (tmp_path / ENCODER_FILE).write_bytes(encoder_bytes(encoder))
    loaded = load_encoder(tmp_path)
    assert type(loaded) is type(encoder)
    assert (loaded.name, loaded.options) == (name, encoder.options | {"drop_path": 0.0})
    images = images_for(encoder)
    assert torch.equal(loaded(images), encoder(images))


@EVERY
def test_it_learns(name):
    """One step of the method changes every parameter that pre-training uses."""
    encoder = small(name, (4, 4))
    model = MaskedImageModel(
        encoder,
        masks=DisjointMasks(mask_ratio=0.5, block_size=1),
        mim=Reconstruction(decoder_dim=16, decoder_depth=1, decoder_heads=2),
        vis=Distillation(projector_dim=16),
    )
    raw = torch.randint(0, 256, (2, 3, *encoder.img_size)).float()
    model(raw / 255, raw, keys=torch.arange(2))["loss"].backward()
    without = [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
