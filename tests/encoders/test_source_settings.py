"""Which encoder given weights belong to: every kind of source gives back the encoder that wrote it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import small_encoder

from dmjd.config import recipes
from dmjd.encoders.base import Encoder
from dmjd.encoders.published import to_published
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.source_settings import as_flags, of_conv_vit, of_plain_vit, of_transformers
from dmjd.encoders.stored import encoder_bytes
from dmjd.images.preprocess import Preprocess
from dmjd.interop.export import export
from dmjd.runs.build import build_encoder
from dmjd.runs.start import begin_from


def rebuilt(source: Path | str, **changes: object) -> Encoder:
    """The encoder that a run starts with if it is told nothing but the source."""
    config, start = begin_from(recipes.folder("images", "run", init=str(source), **changes))
    encoder = build_encoder(config)
    start.load_encoder(encoder)
    return encoder


def assert_same(encoder: Encoder, other: Encoder) -> None:
    assert type(other) is type(encoder)
    assert (other.img_size, other.in_chans) == (encoder.img_size, encoder.in_chans)
    state = other.state_dict()
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())


CASES = {
    "vit_tiny_patch8": {"img_size": (16, 24), "in_chans": 5, "class_token": True, "mlp_ratio": 2.0},
    "vit_tiny_patch4": {"img_size": (32, 32), "in_chans": 1},
    "conv_vit_tiny_patch8": {"img_size": (32, 48)},
    "timm/vit_tiny_patch16_224": {"img_size": (32, 48), "in_chans": 4},
    "timm/vit_small_patch14_reg4_dinov2": {"img_size": (28, 28)},
}


@pytest.mark.parametrize("name", CASES)
def test_an_encoder_file(name, tmp_path):
    encoder = small_encoder(name, **CASES[name])
    encoder.preprocess = Preprocess(encoder.img_size, encoder.in_chans, *((0.5,) * encoder.in_chans,) * 2)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    assert_same(encoder, rebuilt(tmp_path))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch8", {"depth": 1, "class_token": True}),
        ("vit_small_patch4", {"depth": 2, "mlp_ratio": 2.0}),
        ("conv_vit_tiny_patch16", {"depths": (1, 1, 1), "mlp_ratios": (4.0, 4.0, 2.0)}),
    ],
)
def test_published_weights(name, sizes, tmp_path):
    encoder, conv = create_encoder(name, 32, **sizes), name.startswith("conv")
    save_file(
        {to_published(f"encoder.{key}", conv): x for key, x in encoder.state_dict().items()}, tmp_path / "a.safetensors"
    )
    assert_same(encoder, rebuilt(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("name", "form"),
    [("vit_tiny_patch8", "timm"), ("vit_tiny_patch8", "hf"), ("timm/vit_tiny_patch16_224", "timm")],
)
def test_folders_of_other_libraries(name, form, tmp_path):
    encoder = small_encoder(name, img_size=(32, 32), class_token=not name.startswith("timm"))
    encoder.preprocess = Preprocess((32, 32), 3, (0.4,) * 3, (0.3,) * 3)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    export(tmp_path, out=tmp_path / "folder", format=form)
    source = f"local-dir:{tmp_path / 'folder'}" if form == "timm" else tmp_path / "folder"
    again = rebuilt(source)
    assert again.img_size == (32, 32)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.eval().forward_features(images), encoder.eval().forward_features(images))


def test_given_settings_win():
    """The size of the images, alone or with the encoder; the other settings come from the weights."""
    config = recipes.folder(init="x", img_size=48)
    of_encoder = ("encoder", "class_token", "embed_dim", "depth", "num_heads", "mlp_ratio")
    of_tokens = ("mask_ratio", "hog_cell")
    assert config.from_init == (*of_encoder, "in_chans", *of_tokens)
    assert recipes.folder(init="x", encoder="vit_tiny_patch8").from_init == ("img_size", "in_chans", *of_tokens)
    assert recipes.dmjd(init="x", img_size=48).from_init == (*of_encoder, "in_chans")
    everything = {"encoder": "vit_tiny_patch8", "img_size": 32, "in_chans": 3}
    assert recipes.folder(init="x", **everything).from_init is None
    assert recipes.folder(init="x").replace(init="/y").from_init == recipes.folder(init="x").from_init
    assert recipes.folder().from_init is None


@pytest.mark.parametrize(
    ("patch", "size", "given", "expected"),
    [
        (4, 32, {}, (0.85, 4)),
        (4, 32, {"img_size": 96}, (0.85, 4)),
        (4, 8, {}, (0.75, 4)),
        (16, 96, {}, (0.85, None)),
        (16, 96, {"img_size": 32}, (0.75, None)),
        (16, 96, {"mask_ratio": 0.5, "hog_cell": 8}, (0.5, 8)),
        (4, 32, {"encoder": "vit_tiny_patch4"}, (0.85, 4)),
    ],
)
def test_folder_follows_the_tokens_of_the_weights(patch, size, given, expected, tmp_path):
    encoder = small_encoder(f"vit_tiny_patch{patch}", img_size=(size, size))
    encoder.preprocess = Preprocess((size, size), 3, (0.4,) * 3, (0.3,) * 3)
    (tmp_path / "encoder.safetensors").write_bytes(encoder_bytes(encoder))
    if "encoder" in given:
        given = given | {"embed_dim": encoder.embed_dim, "depth": encoder.depth, "num_heads": 2}
    config, _ = begin_from(recipes.folder(init=str(tmp_path / "encoder.safetensors"), **given))
    assert (config.mask_ratio, config.hog_cell) == expected


def test_names_of_transformers():
    norm = {"norm.weight": torch.zeros(384)}
    assert of_transformers("dinov2", norm, 6) == {"encoder": "timm/vit_small_patch14_dinov2"}
    assert of_transformers("dinov3_vit", norm, 6) == {"encoder": "timm/vit_small_patch16_dinov3"}
    gated = norm | {"blocks.0.mlp.fc1_g.weight": torch.zeros(1)}
    assert of_transformers("dinov3_vit", gated, 6) == {"encoder": "timm/vit_small_plus_patch16_dinov3"}
    assert of_transformers("dinov2", {"norm.weight": torch.zeros(100)}, 6) is None


def test_sizes_without_a_name():
    """A ViT of any width if its heads are known; a ConvViT of named widths only."""
    vit = create_encoder("vit_tiny_patch8", 32, embed_dim=64, depth=1, num_heads=4).state_dict()
    assert of_plain_vit(vit) is None
    assert as_flags(of_plain_vit(vit, 4)) == "--encoder vit_tiny_patch8 --embed-dim 64 --depth 1 --num-heads 4"
    narrow = create_encoder("conv_vit_tiny_patch8", 32, embed_dims=(8, 12, 16), depths=(1, 1, 1), num_heads=2)
    assert of_conv_vit(narrow.state_dict()) is None
    assert of_conv_vit(vit) is None


def test_weights_that_do_not_say_which_encoder_they_belong_to(tmp_path):
    vit = create_encoder("vit_tiny_patch8", 32, embed_dim=64, depth=1, num_heads=4).state_dict()
    save_file({to_published(f"encoder.{key}", False): x for key, x in vit.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not say which encoder has these weights: give --encoder"):
        rebuilt(tmp_path / "a.safetensors")
    encoder = rebuilt(
        tmp_path / "a.safetensors", encoder="vit_tiny_patch8", embed_dim=64, depth=1, num_heads=4, img_size=32
    )
    assert torch.equal(encoder.norm.weight, vit["norm.weight"])
