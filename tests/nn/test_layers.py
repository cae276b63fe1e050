"""Blocks: memory saved for the backward pass, checkpointing, skipped tokens."""

import pytest
import torch
from support import grads

from dmjd.nn.depthwise import dense_depthwise
from dmjd.nn.layers import ConvBlock, TransformerBlock, set_checkpointing


def bytes_saved(block, *inputs):
    """Bytes that a block saves for the backward pass besides parameters and its input."""
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *inputs) if isinstance(t, torch.Tensor)}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(*inputs)
    assert out.requires_grad
    return sum(storage.nbytes() for address, storage in saved.items() if address not in known)


def test_a_transformer_block_saves_qkv_attention_and_one_hidden_layer():
    torch.manual_seed(0)
    rows, D = 4 * 64, 32
    block, x = TransformerBlock(D, 4, 4.0), torch.randn(4, 64, D, requires_grad=True)
    unit = rows * D * 4
    saved = bytes_saved(block, x)
    assert saved <= (3 + 1 + 1 + 4) * unit + rows * 4 * 8  # qkv, its attention, the sum after it, the hidden layer
    set_checkpointing(block, True)
    assert bytes_saved(block, x) <= 1.5 * unit


@pytest.mark.parametrize("kind", ["transformer", "convolution"])
def test_checkpointing_changes_no_gradient(kind):
    torch.manual_seed(0)
    if kind == "transformer":
        block, x, rest = TransformerBlock(16, 4, 2.0), torch.randn(2, 9, 16, requires_grad=True), (3,)
    else:
        block, x, rest = ConvBlock(16, 2.0), torch.randn(2, 9, 7, 16, requires_grad=True), (dense_depthwise,)
    direction, gradients = None, []
    for checkpointing in (False, True):
        set_checkpointing(block, checkpointing)
        out = block(x, *rest)
        direction = torch.randn_like(out) if direction is None else direction
        gradients.append(grads((out * direction).sum(), x, *block.parameters()))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_skipped_tokens_are_attended_to_but_not_computed():
    torch.manual_seed(0)
    block = TransformerBlock(16, 4, 2.0)
    x = torch.randn(2, 9, 16, requires_grad=True)
    part, whole = block(x, skip=4), block(x)[:, 4:]
    torch.testing.assert_close(part, whole)
    direction = torch.randn_like(whole)
    wanted = grads((whole * direction).sum(), x, *block.parameters())
    for got, want in zip(grads((part * direction).sum(), x, *block.parameters()), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert wanted[0][:, :4].abs().sum() > 0
