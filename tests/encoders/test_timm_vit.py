"""Every vision transformer of timm as an encoder: equal to timm's own; and through the commands."""

import functools
import re
from inspect import signature
from unittest.mock import patch

import pytest
import timm
import torch
from dense_sets import make_segmentation_set
from support import ROOT, TINY_FIELDS, mistake
from timm.layers import PatchEmbed
from torch import nn

import dmjd
from dmjd.encoders.registry import create_encoder, fresh_like
from dmjd.encoders.timm_names import timm_names
from dmjd.encoders.timm_vit import TimmViT, gather_rotary
from dmjd.encoders.weights import load_encoder
from dmjd.interop.conversion import timm_call
from dmjd.nn.layers import TransformerBlock
from dmjd.nn.tokens import gather_tokens

CONVOLUTIONAL = re.compile(r"vitamin_|vit_base_mci|_r\d*_s\d+|_resnet")  # their stems mix patches

NAMES = [name for name in timm_names() if not CONVOLUTIONAL.search(name)]

# Sizes of tests. Sapiens 2 has a number of key heads for each of its blocks.
SMALL = {"embed_dim": 48, "num_heads": 6, "mlp_ratio": 2.0}


@functools.cache
def sizes_of(name: str) -> dict:
    return {"embed_dim": 8 * heads, "mlp_ratio": 2.0} if (heads := _sapiens_heads(name)) else SMALL | {"depth": 2}


def _sapiens_heads(name: str) -> int | None:
    if not name.endswith("sapiens2"):
        return None
    with patch("timm.models.eva.build_model_with_cfg", lambda *_, **arguments: arguments):
        return getattr(timm.models.eva, name)()["num_heads"]  # without building billions of parameters


def small_pair(name: str, **options) -> tuple[TimmViT, nn.Module]:
    """A small encoder for images of 2 x 3 tokens and timm's model with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    patch = TimmViT.named_arguments(f"/{name}")["patch_size"]
    encoder = create_encoder(f"timm/{name}", (2 * patch, 3 * patch), 2, **sizes_of(name) | options).eval()
    with torch.no_grad():
        std = 0.1 if encoder.depth == 2 else 0.02
        for key, parameter in encoder.named_parameters():  # positions, layer scale and biases matter
            if parameter.ndim < 3:
                parameter.normal_(float("norm" in key and key.endswith("weight")), std)
            elif parameter.ndim == 3:
                parameter.normal_(0, 0.5)
    architecture, arguments = timm_call(encoder)
    theirs = timm.create_model(architecture, **arguments).eval()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    return encoder, theirs


def masked_features(theirs: nn.Module, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """timm's ``forward_features(images, attn_mask=mask)``, which not every version of its Eva has."""
    x = theirs._pos_embed(theirs.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = theirs.norm_pre(x)
    for i, block in enumerate(theirs.blocks):
        rotary = {} if rope is None else {"rope": rope[i] if theirs.rope_mixed else rope}
        x = block(x, attn_mask=mask, **rotary)
    return theirs.norm(x)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_name_computes_what_timm_does(name):
    """All tokens; and some of them, which timm computes under an attention mask that leaves the others out."""
    encoder, theirs = small_pair(name)
    images, P = torch.randn(2, 2, *encoder.img_size), encoder.num_prefix_tokens
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(encoder.forward_features(images), theirs.forward_features(images))

    ids = torch.tensor([[4, 0, 2], [1, 5, 3]])
    mask = torch.zeros(2, P + 6, dtype=torch.bool)
    mask[:, :P] = True
    mask.scatter_(1, ids + P, True)  # True: attended to
    expected = masked_features(theirs, images, mask[:, None, None])
    visible = encoder.norm(encoder(images, visible=ids))
    close(visible[:, :P], expected[:, :P])
    close(visible[:, P:], gather_tokens(expected[:, P:], ids))

    layers = {encoder.layer_of(key) for key, _ in encoder.named_parameters()}
    assert layers == set(range(encoder.depth + 1))


def test_no_name_is_left_out():
    """The others have convolutional stems."""
    counted = re.search(r"work: (\d+) in timm (\S+)\.", (ROOT / "docs" / "encoders.md").read_text())
    assert counted is not None
    assert timm.__version__ != counted[2] or len(NAMES) == int(counted[1])
    for name in set(timm_names()) - set(NAMES):
        with pytest.raises(ValueError, match="convolutional stem"):
            create_encoder(f"timm/{name}", 32)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224", "eva02_tiny_patch14_224"]
)
@torch.no_grad()
def test_images_of_another_size_are_computed_as_timm_does(name):
    encoder, _ = small_pair(name)
    architecture, arguments = timm_call(encoder)
    theirs = timm.create_model(architecture, **arguments, dynamic_img_size=True).eval()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    P = encoder.patch_size
    images = torch.randn(1, 2, 5 * P, 4 * P)
    expected = theirs.forward_features(images)
    torch.testing.assert_close(encoder.forward_features(images), expected, rtol=1e-5, atol=1e-5)


# ---- parts


def test_plain_blocks_are_ours_and_the_others_timms():
    kinds = {
        "vit_tiny_patch16_224": True,
        "vit_small_patch14_reg4_dinov2": True,  # layer scale
        "vit_base_patch16_clip_quickgelu_224": False,
        "vit_base_patch16_siglip_gap_224": True,
        "vit_small_patch16_dinov3": False,
        "test_vit4": False,
    }
    for name, own in kinds.items():
        blocks = small_pair(name)[0].blocks
        assert all(isinstance(block, TransformerBlock) == own for block in blocks), name


@pytest.mark.skipif("rope_shift_coords" not in signature(timm.models.Eva).parameters, reason="an older timm")
def test_the_random_shifts_of_rotary_positions_are_off():
    arguments = {"rope_shift_coords": 0.5, "img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 6}
    theirs = timm.create_model("vit_small_patch16_dinov3", **arguments)
    first, second = (theirs.train().rope.get_embed(shape=[2, 2]) for _ in range(2))
    assert not torch.equal(first, second)  # what they do
    encoder, _ = small_pair("vit_small_patch16_dinov3")
    encoder.rope.aug_active, encoder.rope.shift_coords = True, 0.5
    images = torch.randn(1, 2, *encoder.img_size)
    assert torch.equal(encoder.train()(images), encoder(images))
    assert encoder.training
    assert not encoder.rope.training


def test_rotary_positions_follow_the_ids():
    ids = torch.tensor([[3, 0], [1, 2]])
    table, by_head = torch.randn(4, 6), torch.randn(5, 4, 6)
    rows = gather_rotary(table, ids)
    assert rows.shape == (2, 1, 2, 6)
    assert torch.equal(rows[0, 0], table[[3, 0]])
    rows = gather_rotary(by_head, ids)
    assert rows.shape == (2, 5, 2, 6)
    assert torch.equal(rows[1, 4], by_head[4, [1, 2]])
    assert gather_rotary(by_head, None) is by_head


def test_arguments_change_what_the_name_says():
    name = "timm/vit_base_patch16_gap_224"
    encoder = create_encoder(name, (24, 32), class_token=True, patch_size=8, embed_dim=48, depth=3, num_heads=2)
    assert (encoder.num_prefix_tokens, encoder.grid, encoder.embed_dim, encoder.depth) == (1, (3, 4), 48, 3)
    assert create_encoder(name, **encoder.options).state_dict().keys() == encoder.state_dict().keys()
    assert create_encoder(name, 32, depth=1).num_prefix_tokens == 0
    assert type(encoder.patch_embed) is PatchEmbed


def test_weights_come_from_the_seed_alone():
    encoder = create_encoder("timm/vit_small_patch16_rope_mixed_224", 32, **SMALL, depth=1)
    state = torch.get_rng_state()
    first, again, other = (fresh_like(encoder, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["rope.freqs"], other["rope.freqs"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "timm cannot build vit_tiny_patch16_224 with .*num_heads=5: dim should be divisible"),
        ({"img_size": 30}, "30 x 30 is not divisible by the encoder's 16-pixel patch"),
        ({"drop_path": 1.0}, "drop_path must lie in"),
        ({"reg_tokens": 4}, "does not take reg_tokens; it takes .*patch_size"),
        ({"model": "x"}, "does not take model"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"embed_dim": 16_384 * 2, "depth": 1000}, "embed_dim must be at most"),
        ({"embed_dim": 16_384, "num_heads": 8, "depth": 1000}, "vit_tiny_patch16_224 is too large: its weights alone"),
    ],
)
def test_arguments_that_timm_does_not_take_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_encoder("timm/vit_tiny_patch16_224", **{"img_size": 32} | options)
    assert "\n" not in str(error.value)


# ---- commands


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_huge_plus_patch16_dinov3"])
def test_it_is_pretrained_evaluated_and_exported(name, image_folder, tmp_path):
    """Plain; registers and rotary positions; these with SwiGLU."""
    config = dmjd.recipes.get_recipe("dmjd")(data=str(image_folder), out=str(tmp_path / "run"))
    fields = {"encoder": f"timm/{name}", "embed_dim": (48,), "depth": (2,), "num_heads": 4, "img_size": (64,)}
    config = config.replace(**TINY_FIELDS | fields, epochs=None, steps=2, batch_size=4, num_workers=0, drop_path=0.2)
    dmjd.pretrain(config)
    encoder = load_encoder(tmp_path / "run")
    assert isinstance(encoder, TimmViT)
    assert (encoder.embed_dim, encoder.depth, encoder.preprocess is not None) == (48, 2, True)

    options = {"data": str(image_folder), "labels": "folder", "device": "cpu", "num_workers": 0}
    features = dmjd.embed(tmp_path / "run", out=tmp_path / "features.npy", **options)
    assert features.exists()
    shapes = make_segmentation_set(tmp_path / "shapes", {"train": 4, "test": 2})
    quick = {"steps": 2, "batch_size": 2, "device": "cpu", "num_workers": 0, "img_size": 32, "num_evals": 0}
    result = dmjd.evaluate("segmentation", tmp_path / "run", data=shapes, **quick)
    assert 0 <= result["result"]["miou"] <= 1

    done = dmjd.export(tmp_path / "run", format="timm", out=tmp_path / "timm.safetensors")
    scope: dict = {}
    exec(done.usage, scope)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = scope["model"].eval().forward_features(images)
    torch.testing.assert_close(encoder.forward_features(images), theirs, rtol=1e-5, atol=1e-5)


def test_a_wrong_name_ends_the_command(tmp_path, capsys):
    for command in ("pretrain", "bench"):
        line = [command, "digits", "--out", tmp_path / "run", "--device", "cpu", "--encoder"]
        assert "did you mean 'vit_small_patch16_224'" in mistake(capsys, *line, "timm/vit_smal_patch16_224")
        assert "cannot leave masked tokens out" in mistake(capsys, *line, "timm/swin_tiny_patch4_window7_224")
    assert "dim should be divisible by --num-heads" in mistake(capsys, *line, "timm/test_vit", "--num-heads", 5)
    assert not (tmp_path / "run").exists()
