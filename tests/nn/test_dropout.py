"""Stochastic depth and channel dropout: functions of an image's key, not of its batch."""

import pytest
import torch
from torch import nn

from dmjd.nn.dropout import ChannelDropout, DropPath, set_row_keys
from dmjd.rng import hash64


def layers(rate=0.4):
    return nn.ModuleList([DropPath(rate), ChannelDropout(rate), DropPath(rate)]).train()


def drop(module, keys, width=8):
    set_row_keys(module, keys)
    return [layer(torch.ones(len(keys), width, 2, 2)) for layer in module]


def test_a_row_is_dropped_by_its_key_whatever_its_batch():
    keys = hash64(torch.arange(64))
    whole = drop(layers(), keys)
    order = torch.randperm(64)
    for a, b in zip(whole, drop(layers(), keys[order]), strict=True):
        assert torch.equal(a[order], b)
    for a, b in zip(whole, drop(layers(), keys[10:11]), strict=True):
        assert torch.equal(a[10:11], b)


def test_rates_and_scale():
    path, channels, other = drop(layers(0.3), hash64(torch.arange(4000)))
    for dropped in (path, channels):
        assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(path, path[:, :1].expand_as(path))  # whole rows
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(channels))  # whole channels
    assert not torch.equal(channels[:, 0], channels[:, 1])
    together = float(((path == 0) & (other == 0)).all(dim=(1, 2, 3)).float().mean())
    assert together == pytest.approx(0.09, abs=0.02)  # layers are independent


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    x = torch.rand(4, 3, 2, 2)
    for module in (layers().eval(), layers(0.0)):
        set_row_keys(module, torch.arange(4))
        assert all(layer(x) is x for layer in module)


def test_keys_serve_one_forward_pass():
    layer = DropPath(0.5).train()
    x = torch.ones(200, 1)
    set_row_keys(layer, torch.arange(200))
    first = layer(x)
    torch.manual_seed(0)
    second = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), second)  # from torch's generator
    assert not torch.equal(first, second)


def test_keys_of_another_number_of_rows_are_refused():
    layer = DropPath(0.5).train()
    set_row_keys(layer, torch.arange(3))
    with pytest.raises(ValueError, match="3 rows, the input has 4"):
        layer(torch.ones(4, 1))
