"""Attention of the last block, and tokens as colors."""

import pytest
import torch
import torch.nn.functional as F
from figure_models import rows_of, small_encoder, titles

from dmjd.figures.attention import MAX_HEADS, attention_figure, last_attention


@pytest.mark.parametrize("class_token", [False, True])
def test_attention_equals_that_of_pytorch(class_token):
    encoder = small_encoder(class_token=class_token)
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        received, tokens = last_attention(encoder, images)
        block = encoder.blocks[-1]
        x = block.norm1(encoder.blocks[0](encoder.prepare(images)[0])).transpose(0, 1)  # N, B, D
        _, weights = F.multi_head_attention_forward(
            *(x, x, x, 16, 2, block.attn.qkv.weight, block.attn.qkv.bias, None, None, False, 0.0),
            *(block.attn.proj.weight, block.attn.proj.bias),
            average_attn_weights=False,
        )  # B, heads, N, N
    prefix = int(class_token)
    torch.testing.assert_close(received, weights[:, :, prefix:, prefix:].mean(2))
    torch.testing.assert_close(tokens, encoder(images)[:, prefix:])
    total = received.sum(-1)
    assert (total < 0.999).all() if class_token else torch.allclose(total, torch.ones(3, 2))
    assert not block._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "size", "chans", "heads"),
    [
        ("vit_tiny_patch8", (32, 48), 5, 8),
        ("conv_vit_tiny_patch8", (48, 32), 1, 2),
        ("conv_vit_tiny_patch4", (16, 16), 3, 2),
    ],
)
def test_attention_figure_has_a_panel_for_each_head_up_to_six(name, size, chans, heads):
    encoder = small_encoder(name, size, chans, heads).train()
    figure = attention_figure(encoder, torch.randint(0, 256, (5, chans, *size)), num_shown=3)
    shown = min(heads, MAX_HEADS)
    assert len(titles(figure)) == 3 + shown
    assert [len(row) for row in rows_of(figure)] == 3 * [3 + shown]
    assert encoder.training
    assert rows_of(figure)[0][2].image.shape == (*size, 3)
    assert ("of 8 heads" in figure.get_supxlabel()) == (heads > MAX_HEADS)
