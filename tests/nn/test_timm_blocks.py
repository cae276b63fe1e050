"""Blocks of timm: the plain kind becomes ours, the others stay; both draw stochastic depth from keys."""

import pytest
import torch
from timm import layers
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import nn

from dmjd.nn.dropout import DropPath
from dmjd.nn.layers import TransformerBlock
from dmjd.nn.timm_blocks import own_block


@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.3}, {"norm_layer": nn.LayerNorm}, {"norm_layer": layers.LayerNorm}]
)
@pytest.mark.parametrize("skip", [0, 3])
def test_a_plain_block_becomes_ours_and_keeps_its_weights(options, skip):
    torch.manual_seed(0)
    block = Block(24, 3, 2.7, qkv_bias=True, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    own = own_block(block, 0.2)
    assert isinstance(own, TransformerBlock)
    theirs, ours = block.state_dict(keep_vars=True), own.state_dict(keep_vars=True)
    assert theirs.keys() == ours.keys()
    assert all(value is ours[key] for key, value in theirs.items())
    assert (own.drop_path1.rate, own.drop_path2.rate) == (0.2, 0.2)
    x = torch.randn(2, 5, 24, requires_grad=True)
    expected, found = block.eval()(x)[:, skip:], own.eval()(x, skip=skip)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs = [x, *block.parameters()]
    theirs, ours = (torch.autograd.grad(y.square().sum(), inputs) for y in (expected, found))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"scale_mlp_norm": True},
        {"proj_bias": False},
        {"proj_drop": 0.1},
        {"attn_drop": 0.1},
        {"norm_layer": layers.RmsNorm},
        {"act_layer": nn.SiLU},
        {"act_layer": lambda: nn.GELU(approximate="tanh")},
    ],
)
def test_other_blocks_stay(options):
    block = Block(24, 3, drop_path=0.5, **{"qkv_bias": True} | options)
    assert own_block(block, 0.2) is block


def test_stochastic_depth_of_other_blocks_is_ours():
    for block in (EvaBlock(24, 3, drop_path=0.5), ParallelThingsBlock(24, 3, drop_path=0.5)):
        drops = [part for part in own_block(block, 0.2).modules() if isinstance(part, DropPath)]
        assert [drop.rate for drop in drops] == [0.2] * (2 if isinstance(block, EvaBlock) else 4)
        assert not any(isinstance(part, layers.DropPath) for part in block.modules())
