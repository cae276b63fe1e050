"""Encoders by name: sizes, errors, copies, and a new family added by one registry entry."""

import ast
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from support import TINY_FIELDS, small_encoder
from torch import nn

import dmjd
from dmjd.branches import default_decoder
from dmjd.encoders.base import Encoder, drop_path_rates
from dmjd.encoders.registry import ENCODERS, create_encoder, encoder_names, fresh_like, nearest_name, resized
from dmjd.encoders.source_settings import of_plain_vit
from dmjd.encoders.weights import load_encoder
from dmjd.engine.layer_decay import layer_groups
from dmjd.evaluation.supervised.pyramid import Pyramid
from dmjd.images.preprocess import Preprocess
from dmjd.interop.conversion import timm_call
from dmjd.nn.layers import TransformerBlock, TransformerNorm, block_flops
from dmjd.nn.tokens import gather_tokens, sincos_positions
from dmjd.runs.build import build_encoder


@pytest.mark.parametrize("name", encoder_names())
def test_every_name_builds(name):
    side = int(name.rpartition("patch")[2]) * 2
    with torch.device("meta"):
        encoder = create_encoder(name, img_size=(side, 2 * side))
    widths = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280, "giant": 1408}
    size = name.split("_")[-2]
    assert encoder.embed_dim == widths[size]
    assert (encoder.name, encoder.grid, encoder.patch_size, encoder.in_chans) == (name, (2, 4), side // 2, 3)
    depths = {"large": 24, "huge": 32, "giant": 40}
    assert len(encoder.blocks) == depths.get(size, 12) - name.startswith("conv")
    assert encoder.decoder_mlp_ratio == (8 if name.startswith("conv") else 48 / 11 if size == "giant" else 4)


@pytest.mark.parametrize(("size", "millions"), [("large", 303), ("huge", 631), ("giant", 1011)])
def test_the_largest_are_those_of_timm(size, millions):
    """timm has large with patch 16, the larger ones with patch 14."""
    patch = 16 if size == "large" else 14
    with torch.device("meta"):
        encoder = create_encoder(f"vit_{size}_patch{patch}", class_token=True)
        named = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=0)
    assert timm_call(encoder) == (f"vit_{size}_patch{patch}_224", {"num_classes": 0})
    ours, theirs = ({name: value.shape for name, value in m.state_dict().items()} for m in (encoder, named))
    assert ours == theirs
    assert encoder.num_heads == named.blocks[0].attn.num_heads
    assert round(sum(value.numel() for value in named.parameters()) / 1e6) == millions
    assert of_plain_vit(encoder.state_dict()) == {"encoder": encoder.name, "class_token": True} | dict.fromkeys(
        ("embed_dim", "depth", "num_heads", "mlp_ratio")
    )
    assert default_decoder(encoder.embed_dim) == (512, 8, 16)  # as for all sizes of MAE


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
        ("vit_tiny_patch16", {"img_size": 0}, "img_size must be at least 1"),
        ("vit_tiny_patch16", {"img_size": 8}, "8 x 8 is not divisible"),
        ("vit_tiny_patch16", {"img_size": 10**9}, "img_size must be at most"),
        ("vit_tiny_patch16", {"img_size": (32, True)}, "img_size must be int, got True"),
        ("vit_tiny_patch16", {"img_size": "32"}, "img_size must be int, got '32'"),
        ("vit_tiny_patch16", {"img_size": (32, 32, 32)}, "img_size must be one side or"),
        ("vit_tiny_patch2", {"img_size": 8192}, "cut an image into 16777216 tokens"),
        ("vit_tiny_patch16", {"depth": 10**9}, "depth must be at most 1000"),
        ("vit_tiny_patch16", {"depth": True}, "depth must be int, got True"),
        ("vit_tiny_patch16", {"depth": 0}, "depth must be at least 1"),
        ("vit_tiny_patch16", {"num_heads": 0}, "num_heads must be at least 1"),
        ("vit_tiny_patch16", {"num_heads": -3}, "num_heads must be at least 1"),
        ("vit_tiny_patch16", {"embed_dim": 16_384, "depth": 1000}, "its weights alone take"),
        ("vit_tiny_patch16", {"embed_dim": 10**9}, "embed_dim must be at most"),
        ("vit_tiny_patch16", {"embed_dim": "64"}, "embed_dim must be int"),
        ("vit_tiny_patch16", {"mlp_ratio": float("nan")}, "mlp_ratio must be"),
        ("vit_tiny_patch16", {"class_token": "no"}, "class_token must be bool"),
        ("vit_tiny_patch16", {"drop_path": "0"}, "drop_path must be float"),
        ("conv_vit_tiny_patch16", {"embed_dims": (64, 128)}, "embed_dims must be 3 numbers"),
        ("conv_vit_tiny_patch16", {"embed_dims": 64}, "embed_dims must be 3 numbers, got 64"),
        ("conv_vit_tiny_patch16", {"depths": (2, 2, 10**9)}, "depths must be at most"),
        ("vit_tiny_patch16", {"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ("vit_tiny_patch16", {"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ("vit_tiny_patch16", {"embed_dim": 64}, "3 attention heads do not divide the width 64"),
        ("vit_tiny_patch16", {"embed_dim": 30}, "divisible by 4"),
    ],
)
def test_errors_explain_what_cannot_be_built(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_encoder(name, **{"img_size": 32} | options)


# ---- copies


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_copies_have_the_weights_of_a_seed_or_of_the_encoder(name):
    encoder = small_encoder(name, img_size=32)
    encoder.preprocess = Preprocess((32, 32))
    state = torch.get_rng_state()
    first, again, other = (fresh_like(encoder, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    same = resized(encoder, drop_path=0.5)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in encoder.state_dict().items())
    assert same.preprocess == encoder.preprocess
    assert same.options == encoder.options | {"drop_path": 0.5}
    assert not same.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch8"])
def test_a_resized_copy_has_positions_of_its_grid(name):
    encoder, images = small_encoder(name, img_size=32), torch.randn(2, 3, 24, 64)
    copy = resized(encoder, (24, 64))
    assert (copy.img_size, copy.grid) == ((24, 64), (3, 8))
    torch.testing.assert_close(copy.pos_embed, sincos_positions(encoder.embed_dim, (3, 8)))
    torch.testing.assert_close(copy(images), encoder(images))
    nn.init.normal_(encoder.pos_embed)  # learned positions
    torch.testing.assert_close(resized(encoder, (24, 64))(images), encoder(images))
    assert fresh_like(encoder, seed=0, img_size=(24, 64)).grid == (3, 8)


def test_the_nearest_name_is_that_of_the_nearest_width():
    for name in ("vit_small_patch16", "conv_vit_large_patch4"):
        cls = ENCODERS[name[: name.index("vit") + 3]]
        width = {"small": 384, "large": 1024}[name.split("_")[-2]]
        assert nearest_name(cls, width + 20, int(name.rpartition("patch")[2])) == name


# ---- a family


class Toy(Encoder):
    """Two transformer blocks on patches, and a finer map from the quarters of each patch."""

    SIZES: ClassVar = {"mini": {"width": 16, "layers": 2}}
    PATCHES = (8,)
    SETTINGS: ClassVar = {"embed_dim": ("width", 1), "depth": ("layers", 1)}

    def __init__(self, *, img_size, patch_size, in_chans=3, width=16, layers=2, drop_path=0.0):
        super().__init__(img_size, patch_size, in_chans, width)
        self.decoder_mlp_ratio = 2.0
        self.fine = nn.Conv2d(in_chans, 8, patch_size // 2, patch_size // 2)
        self.coarse = nn.Linear(patch_size**2 * in_chans, width)
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid), requires_grad=False)
        rates = drop_path_rates(drop_path, layers)
        self.blocks = nn.ModuleList(TransformerBlock(width, 2, 2.0, rate) for rate in rates)
        self.norm = TransformerNorm(width)
        self.feature_info = [
            {"num_chs": 8, "reduction": patch_size // 2, "module": "fine"},
            {"num_chs": width, "reduction": patch_size, "module": "blocks"},
        ]
        self.init_weights()

    def block_outputs(self, images, count, visible=None):
        positions = self.positions(self.check_images(images))
        x = self.coarse(self.visible_patches(images, visible))
        x = x + (positions if visible is None else gather_tokens(positions.expand(len(visible), -1, -1), visible))
        outputs = [x := block(x) for block in self.blocks]
        return outputs[-count:]

    def forward_stages(self, images, visible=None):
        return self.block_outputs(images, 1, visible)[0], []

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        tokens = self(x)
        maps = [F.gelu(self.fine(x)), tokens.transpose(1, 2).unflatten(2, self.check_images(x))]
        taken = [maps[i] for i in (range(2) if indices is None else indices)]
        return taken if intermediates_only else (self.norm(tokens), taken)

    def prune_intermediate_layers(self, indices=None, prune_norm=False, prune_head=True):
        return [0, 1]

    def flops(self, num_visible=None):
        V = num_visible or self.num_patches
        return len(self.blocks) * block_flops(V, self.embed_dim, 2.0)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", Toy)
    return "toy_mini_patch8"


def test_one_entry_adds_a_family(toy, image_folder, tmp_path):
    """It is named, sized by settings, pre-trained, saved, loaded and evaluated without any other change."""
    assert toy in encoder_names()
    with pytest.raises(ValueError, match="did you mean 'toy_mini_patch8'"):
        create_encoder("toy_mni_patch8")
    with pytest.raises(ValueError, match=r"Toy has no class token; use a vit_\* or timm/\* encoder"):
        create_encoder(toy, 32, class_token=True)
    fields = TINY_FIELDS | {"encoder": toy, "embed_dim": (24,), "depth": (3,), "num_heads": None, "img_size": (32,)}
    config = dmjd.recipes.get_recipe("dmjd")(data=str(image_folder), out=str(tmp_path / "run"))
    config = config.replace(**fields, epochs=None, steps=2, batch_size=4, num_workers=0)
    with pytest.raises(ValueError, match="--depth takes 1 number"):
        build_encoder(config.replace(depth=(1, 2, 3)))
    with pytest.raises(ValueError, match="--num-heads has no meaning for toy_mini_patch8"):
        build_encoder(config.replace(num_heads=2))
    dmjd.pretrain(config)
    encoder = load_encoder(tmp_path / "run")
    assert isinstance(encoder, Toy)
    assert (encoder.embed_dim, encoder.depth, encoder.name) == (24, 3, toy)
    assert encoder.preprocess is not None
    with pytest.raises(ValueError, match="timm has no Toy"):
        timm_call(encoder)
    backbone = load_encoder(tmp_path / "run", features_only=True)
    assert backbone.feature_info.channels() == [8, 24]


def test_a_new_family_has_layers_and_a_pyramid(toy):
    encoder = create_encoder(toy, 32)
    pyramid = Pyramid(encoder)
    maps = pyramid(torch.randn(2, 3, 32, 32))
    assert pyramid.strides == [4, 8, 16, 32]
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1)]
    groups = layer_groups(pyramid, 0.05, 0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]
    layer_0 = {id(p) for p in (*encoder.fine.parameters(), *encoder.coarse.parameters(), encoder.pos_embed)}
    assert {id(p) for group in groups if group["lr_scale"] == 0.125 for p in group["params"]} == layer_0


def test_families_are_named_in_their_own_files_only():
    """Outside of the encoders, no string is the name of a family: no code depends on the kind of encoder."""
    package, literal = Path(dmjd.__file__).parent, {"vit", "conv_vit", "conv"}
    for file in package.rglob("*.py"):
        if file.parent.name == "encoders":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.strip("_") not in literal, f"{file}, line {node.lineno}: {node.value}"
