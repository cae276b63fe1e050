"""Scale rule (DMJD), schedule and parameter groups against hand-computed values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dmjd import DisjointMasks, IndependentMasks
from dmjd.engine.optim import OPTIMIZERS, adamw, parameter_groups, reserve_state, scaled_learning_rate, warmup_cosine


def test_scale_rule():
    one_view = scaled_learning_rate(6e-4, 512, DisjointMasks(1, 0.6))
    assert one_view == pytest.approx(6e-4 * 2)
    assert scaled_learning_rate(6e-4, 512, DisjointMasks(2, 0.6)) == pytest.approx(one_view / 0.6)  # p = 1
    assert scaled_learning_rate(6e-4, 512, DisjointMasks(2, 0.6, 0.9)) == pytest.approx(one_view * 1.5)
    assert scaled_learning_rate(6e-4, 512, DisjointMasks(2, 0.3)) == pytest.approx(one_view * 2)  # p = 2 c
    assert scaled_learning_rate(6e-4, 512, IndependentMasks(2, 0.6)) == pytest.approx(one_view * (1 - 0.4**2) / 0.6)


def test_schedule_values():
    assert warmup_cosine(0.0, 0.1) == 0.0
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1) == pytest.approx(0.0, abs=1e-12)
    assert warmup_cosine(0.0, 0.0) == 1.0
    assert math.isfinite(warmup_cosine(1.0, 1.0))


@given(share=st.floats(0, 2), warmup=st.floats(0, 1))
def test_schedule_stays_between_zero_and_one(share, warmup):
    assert 0.0 <= warmup_cosine(share, warmup) <= 1.0


def test_no_decay_on_biases_and_norms_but_on_tokens():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.register_parameter("mask_token", nn.Parameter(nn.init.zeros_(model[0].weight.new_empty(1, 1, 4))))
    model.register_parameter("fixed", nn.Parameter(model[0].weight.new_empty(1, 2), requires_grad=False))
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 3), (1, 1, 4)}
    assert len(plain["params"]) == 3


def test_muon_orthogonalizes_updates_of_matrices_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    models = {name: nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 1)) for name in OPTIMIZERS}
    models["muon"].load_state_dict(models["adamw"].state_dict())
    before = {key: value.clone() for key, value in models["muon"].state_dict().items()}
    x = torch.randn(64, 32)
    for name, model in models.items():
        optimizer = OPTIMIZERS[name](parameter_groups(model, 0.0))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01
        model(x).square().mean().backward()
        optimizer.step()
    update = models["muon"][0].weight - before["0.weight"]
    values = torch.linalg.svdvals(update)[:-1]  # the norm removes one direction of the gradient
    assert values[0] / values[-1] < 1.5  # all directions by about the same amount
    values = torch.linalg.svdvals(models["adamw"][0].weight - before["0.weight"])[:-1]
    assert values[0] / values[-1] > 4
    for key in ("0.bias", "1.weight", "1.bias", "2.weight", "2.bias"):  # a matrix of one row has no directions
        torch.testing.assert_close(
            models["muon"].state_dict()[key], models["adamw"].state_dict()[key], atol=1e-4, rtol=0
        )


def test_reserved_state_is_that_of_the_first_step():
    """Two steps from reserved state give the same bits as two ordinary steps, and the same state dict entries."""
    found = []
    for reserve in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = adamw(parameter_groups(model, 0.1))
        if reserve:
            reserve_state(optimizer)
        for _ in range(2):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((list(model.parameters()), optimizer.state_dict()))
    (ours, our_state), (plain, state) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert our_state["param_groups"] == state["param_groups"]
    for index, entries in state["state"].items():
        assert list(entries) == list(our_state["state"][index])
        assert all(torch.equal(a, our_state["state"][index][key]) for key, a in entries.items())
