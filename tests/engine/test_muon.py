"""Muon: the updates of timm's, whatever the shapes; steps that are skipped on the device; stored state."""

import copy

import pytest
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmjd.engine import muon as module
from dmjd.engine.muon import Muon, is_matrix
from dmjd.engine.optim import BETAS, parameter_groups

SHAPES = [(16, 8), (16, 8), (8, 16), (1, 5, 8), (4, 200), (3, 3), (8, 3, 4, 4), (8, 1, 5, 5), (8,), (2, 8), (600, 4)]


def model_of(shapes) -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (seed + 1)
        optimizer.step()


def as_timm(model: nn.Module) -> timm.optim.Muon:
    return timm.optim.Muon(parameter_groups(model, 0.05), lr=0.0, betas=BETAS)


def ours(model: nn.Module) -> Muon:
    return Muon(parameter_groups(model, 0.05), betas=BETAS)


@pytest.mark.parametrize("together", [1 << 21, 200])
def test_matrices_get_the_updates_of_timms_muon(together, monkeypatch):
    """Bit for bit, also if the matrices of one shape do not fit into one batch; the rest gets those of AdamW."""
    monkeypatch.setattr(module, "_CPU_NUMBERS", together)
    matrices, rest, model = model_of(SHAPES), model_of(SHAPES), model_of(SHAPES)
    take_steps(matrices, as_timm(matrices), range(3))
    take_steps(rest, torch.optim.AdamW(parameter_groups(rest, 0.05), betas=BETAS, eps=1e-7), range(3))
    take_steps(model, ours(model), range(3))
    for got, muon, adamw in zip(model.parameters(), matrices.parameters(), rest.parameters(), strict=True):
        if is_matrix(got):
            assert torch.equal(got, muon), got.shape
        else:
            torch.testing.assert_close(got, adamw, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple))
def test_the_same_parameters_are_matrices(shape):
    model = model_of([shape])
    optimizer = as_timm(model)
    take_steps(model, optimizer, range(1))
    assert is_matrix(next(model.parameters())) == optimizer.state[next(model.parameters())]["use_muon"]


def test_a_run_of_timms_muon_goes_on():
    expected, model = model_of(SHAPES), model_of(SHAPES)
    one, other = as_timm(expected), ours(model)
    take_steps(expected, one, range(2))
    model.load_state_dict(expected.state_dict())
    stored = {"state": one.state_dict()["state"], "param_groups": other.state_dict()["param_groups"]}
    other.load_state_dict(copy.deepcopy(stored))
    take_steps(expected, one, range(2, 4))
    take_steps(model, other, range(2, 4))
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        if is_matrix(got) or "fallback_lr_scale" in one.defaults:  # older versions left the rest untrained
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_on_the_device(bad):
    expected, model = model_of(SHAPES), model_of(SHAPES)
    one, other = ours(expected), ours(model)
    take_steps(expected, one, range(2))
    other.found_inf = torch.zeros(())
    take_steps(model, other, range(2))
    before = copy.deepcopy((list(model.parameters()), other.state_dict()["state"]))
    set_gradients(model, 2)
    for p in model.parameters():
        p.grad.view(-1)[0] = bad
    other.found_inf = torch.ones(())
    other.step()
    other.found_inf = torch.zeros(())
    after = (list(model.parameters()), other.state_dict()["state"])
    for got, want in zip(after[0], before[0], strict=True):
        assert torch.equal(got, want)
    for index, entry in before[1].items():
        assert all(torch.equal(after[1][index][name], value) for name, value in entry.items()), index
    take_steps(expected, one, range(2, 4))
    take_steps(model, other, range(2, 4))
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    model = model_of([(8, 8), (8, 8), (8,)])
    optimizer = ours(model)
    first = next(model.parameters())
    before = first.detach().clone()
    set_gradients(model, 0)
    first.grad = None
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    assert torch.equal(first, before)
    assert first not in optimizer.state
