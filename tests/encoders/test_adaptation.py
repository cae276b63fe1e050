"""Weights for another grid, patch size, number of channels or other prefix tokens."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._manipulate import adapt_input_conv
from torch import Tensor

from dmjd.encoders.adaptation import adapt_channels, fit_first_layer, fit_layer_scale, fit_positions, fit_prefix
from dmjd.nn.tokens import sincos_positions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequence(tensors: dict[str, Tensor], patches: Tensor) -> Tensor:
    """The first tokens of a ViT: prefix tokens and patches, with positions; a short table has none for the prefix."""
    prefix = [tensors[key] for key in ("cls_token", "reg_token") if key in tensors]
    x, table = torch.cat([*prefix, patches], dim=1), tensors["pos_embed"]
    return x + F.pad(table, (0, 0, x.shape[1] - table.shape[1], 0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7])
def test_channels_are_adapted_by_timms_rule(channels):
    kernel = random(4, 3, 2, 2)
    torch.testing.assert_close(adapt_channels(kernel, channels), adapt_input_conv(channels, kernel))


@given(old=st.integers(1, 9), new=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_equal_channels_give_what_they_gave(old, new, seed):
    """An image with the same content in all channels: one channel gives exactly what its copies gave."""
    kernel, gray = random(3, old, 2, 2, seed=seed), random(1, 1, 4, 4, seed=seed + 1)
    adapted = adapt_channels(kernel, new)
    assert adapted.shape == (3, new, 2, 2)
    before = F.conv2d(gray.expand(-1, old, -1, -1), kernel, stride=2)
    if new == 1 or new % old == 0:
        after = F.conv2d(gray.expand(-1, new, -1, -1), adapted, stride=2)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    if new == old:
        assert torch.equal(adapted, kernel)


def test_the_first_layer_reports_what_was_done():
    key = "patch_embed.proj.weight"
    fitted, changes = fit_first_layer({key: random(4, 3, 16, 16)}, {key: torch.empty(4, 5, 14, 14)}, 14)
    assert fitted[key].shape == (4, 5, 14, 14)
    assert changes == ["first layer adapted 3 -> 5 channels", "patches resampled 16 -> 14 pixels"]
    first = "patch_embed1.proj.weight"  # of a ConvViT, whose kernel is a quarter of the patch
    fitted, changes = fit_first_layer({first: random(4, 3, 4, 4)}, {first: torch.empty(4, 3, 2, 2)}, 8)
    assert (fitted[first].shape, changes) == ((4, 3, 2, 2), ["patches resampled 16 -> 8 pixels"])
    linear = {key: random(4, 48)}
    assert fit_first_layer(linear, {key: torch.empty(4, 3, 4, 4)}, 4) == ({}, [])


def test_resampled_patches_see_the_same_in_a_resized_image():
    """FlexiViT's rule: an enlarged image, cut into larger patches, is embedded as before."""
    key, image = "patch_embed.proj.weight", random(1, 3, 8, 8)
    kernel = random(4, 3, 8, 8)
    fitted, _ = fit_first_layer({key: kernel}, {key: torch.empty(4, 3, 16, 16)}, 16)
    larger = F.interpolate(image, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(F.conv2d(larger, fitted[key]), F.conv2d(image, kernel), rtol=1e-3, atol=1e-3)


@given(
    registers=st.integers(0, 3),
    class_token=st.booleans(),
    embedded=st.booleans(),
    wants_embedded=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_prefix_tokens_keep_their_sum_with_positions(registers, class_token, embedded, wants_embedded, seed):
    """Whether a position table has entries for them or not, on either side."""
    prefix = {"cls_token": random(1, 1, 8, seed=seed)} if class_token else {}
    prefix |= {"reg_token": random(1, registers, 8, seed=seed + 1)} if registers else {}
    count = class_token + registers
    tensors = prefix | {"pos_embed": random(1, 6 + embedded * count, 8, seed=seed + 2)}
    wanted = prefix | {"pos_embed": torch.empty(1, 6 + wants_embedded * count, 8)}
    moved, changes = fit_positions(tensors, wanted, (2, 3), (2, 3))
    assert moved["pos_embed"].shape == wanted["pos_embed"].shape
    assert changes == []
    patches = random(1, 6, 8)
    torch.testing.assert_close(sequence(tensors | moved, patches), sequence(tensors, patches))


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_table_of_sines_is_computed_for_the_grid(prefix):
    tensors = {"pos_embed": sincos_positions(16, (4, 4), prefix)}
    moved, changes = fit_positions(tensors, {"pos_embed": torch.empty(1, 24 + prefix, 16)}, (4, 4), (4, 6))
    assert torch.equal(moved["pos_embed"], sincos_positions(16, (4, 6), prefix))
    assert changes == ["positions computed 4 x 4 -> 4 x 6"]


def test_a_learned_table_is_resized_in_two_dimensions():
    """A ramp along one axis stays one along this axis; the entry of the class token stays as it is."""
    ramp = torch.arange(4.0).view(4, 1).expand(4, 4).reshape(1, 16, 1).expand(-1, -1, 6)
    tensors = {"cls_token": random(1, 1, 6), "pos_embed": torch.cat([torch.full((1, 1, 6), 9.0), ramp], dim=1)}
    wanted = {"cls_token": torch.empty(1, 1, 6), "pos_embed": torch.empty(1, 1 + 8 * 6, 6)}
    moved, changes = fit_positions(tensors, wanted, (4, 4), (8, 6))
    assert changes == ["positions resized 4 x 4 -> 8 x 6"]
    assert (moved["pos_embed"][:, 0] == 9).all()
    table = moved["pos_embed"][0, 1:, 0].view(8, 6)
    torch.testing.assert_close(table, table[:, :1].expand(8, 6))
    assert (table[1:, 0] > table[:-1, 0]).all()


def test_prefix_tokens_are_kept_or_dropped():
    tensors = {"cls_token": random(1, 1, 8), "reg_token": random(1, 4, 8)}
    kept, changes = fit_prefix(tensors, {"reg_token": torch.empty(1, 2, 8)})
    assert torch.equal(kept["reg_token"], tensors["reg_token"][:, :2])
    assert changes == ["class token dropped", "registers 4 -> 2"]
    kept, changes = fit_prefix(tensors, {key: torch.empty_like(value) for key, value in tensors.items()})
    assert all(torch.equal(kept[key], tensors[key]) for key in tensors)
    assert changes == []


@pytest.mark.parametrize(("name", "layer"), [("ls1.gamma", "attn.proj"), ("gamma_2", "mlp.fc2")])
def test_layer_scale_moves_into_the_layer_before_it(name, layer):
    tensors = {f"blocks.3.{layer}.weight": random(4, 6), f"blocks.3.{layer}.bias": random(4)}
    gamma, x = random(4, seed=1), random(2, 6)
    plain = {key: torch.empty_like(value) for key, value in tensors.items()}
    moved, used, changes = fit_layer_scale(tensors | {f"blocks.3.{name}": gamma}, plain)
    scaled = gamma * F.linear(x, *tensors.values())
    torch.testing.assert_close(F.linear(x, *moved.values()), scaled)
    assert used == {f"blocks.3.{name}"}
    assert changes == ["layer scale moved into the weights"]
    ones, used, changes = fit_layer_scale(tensors, plain | {f"blocks.3.{name}": torch.empty(4)})
    assert torch.equal(ones[f"blocks.3.{name}"], torch.ones(4))
    assert (used, changes) == (set(), ["layer scale set to 1"])
    same = tensors | {f"blocks.3.{name}": gamma}
    assert fit_layer_scale(same, same) == ({}, set(), [])
