"""Half whitening of features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

from dmjd.evaluation.frozen.features import Features
from dmjd.evaluation.frozen.knn import knn
from dmjd.evaluation.frozen.knn_whitened import knn_whitened
from dmjd.whitening import MOST_ROWS, HalfWhitening


def features(n: int, scales: list[float], seed: int = 0) -> torch.Tensor:
    """[n, D] with these deviations along random directions, far from zero."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(len(scales), len(scales), generator=rng))[0]
    return torch.randn(n, len(scales), generator=rng) * torch.tensor(scales) @ directions + 5


def test_variances_become_their_roots():
    x = features(5000, [4.0, 2.0, 1.0])
    y = HalfWhitening.fit(x)(x)
    assert y.mean(dim=0).abs().max() < 1e-3
    before, after = (torch.linalg.eigvalsh(torch.cov(each.T.double())) for each in (x, y))
    torch.testing.assert_close(after, before.sqrt(), rtol=0.01, atol=0)


def test_it_is_the_root_of_the_root_of_the_covariance_of_ledoit_and_wolf():
    x = features(40, [3.0, 2.0, 1.0, 0.5, 0.1])
    whiten = HalfWhitening.fit(x)
    fourth = torch.linalg.matrix_power(whiten.matrix.double(), 4)  # the inverse of the covariance
    covariance = torch.from_numpy(ledoit_wolf(x.double().numpy())[0])
    torch.testing.assert_close(fourth @ covariance, torch.eye(5).double(), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 30), width=st.integers(1, 12), seed=st.integers(0, 100), constant=st.booleans())
def test_any_set_of_features_has_finite_ones(n, width, seed, constant):
    """Fewer features than directions, directions without variance, equal features."""
    x = features(n, [10.0 ** -(i % 7) for i in range(width)], seed)
    x = x[:1].expand(n, -1) if constant else x
    y = HalfWhitening.fit(x)(x)
    assert y.shape == x.shape
    assert bool(y.isfinite().all())
    torch.testing.assert_close(HalfWhitening.fit(x)(x), y, rtol=0, atol=0)


def test_other_features_are_mapped_alike():
    x = features(300, [4.0, 1.0])
    whiten = HalfWhitening.fit(x)
    torch.testing.assert_close(whiten(x[:7]), whiten(x)[:7])
    with pytest.raises(ValueError, match="features have 1 values, those of the map 2"):
        whiten(x[:, :1])


def test_features_of_a_model_may_carry_gradients():
    x = features(20, [2.0, 1.0]).requires_grad_()
    whiten = HalfWhitening.fit(x)
    assert not whiten.matrix.requires_grad
    assert whiten(x).requires_grad


def test_many_features_are_read_in_part():
    x = features(3 * MOST_ROWS, [10.0, 1.0])
    y = HalfWhitening.fit(x)(x)
    deviations = torch.linalg.eigvalsh(torch.cov(y.T)).sqrt()
    torch.testing.assert_close(deviations, torch.tensor([1.0, 10.0**0.5]), rtol=0.05, atol=0)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4), torch.zeros(4), torch.zeros(3, 0), torch.full((2, 1), torch.nan)])
def test_unusable_features(wrong):
    with pytest.raises(ValueError, match="features"):
        HalfWhitening.fit(wrong)


def test_a_strong_direction_no_longer_decides_the_neighbors():
    """Classes lie along a weak direction; a strong one, such as brightness, has nothing to do with them."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    x = torch.stack([20 * torch.randn(400, generator=rng), labels + 0.1 * torch.randn(400, generator=rng)], dim=1)
    parts = [Features(x[rows], labels[rows], rows) for rows in torch.arange(400).split(200)]
    plain, whitened = (task(*parts)["top1"] for task in (knn, knn_whitened))
    assert whitened > plain + 0.05
    assert whitened > 0.95
