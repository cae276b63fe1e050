"""Measures of features without labels: known spectra, invariances, collapse, and neighbors between two measurements."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmjd import create_encoder
from dmjd.data.sources.registry import open_source
from dmjd.evaluation.frozen import quality
from dmjd.evaluation.frozen.quality import FeatureQuality, alpha_req, effective_rank, feature_std
from dmjd.images.preprocess import Preprocess


def with_spectrum(n: int, eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Features [n, D] whose covariance has exactly these eigenvalues, with some mean."""
    torch.manual_seed(seed)
    D = len(eigenvalues)
    centered = torch.randn(n, D, dtype=torch.float64)
    directions, _ = torch.linalg.qr(centered - centered.mean(dim=0))  # n, D: columns of mean 0
    rotation, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    return math.sqrt(n) * (directions * eigenvalues.sqrt()) @ rotation + torch.randn(D, dtype=torch.float64)


@given(st.integers(1, 16), st.integers(0, 8), st.floats(0.01, 100.0))
def test_effective_rank_counts_equal_directions(used, unused, scale):
    eigenvalues = torch.cat([torch.ones(used), torch.zeros(unused)]).double()
    assert effective_rank(scale * with_spectrum(40, eigenvalues)) == pytest.approx(used, rel=1e-3)


def test_effective_rank_by_hand():
    """Singular values in the ratio 2 : 1 : 1 have an entropy of 1.5 bits."""
    assert effective_rank(with_spectrum(50, torch.tensor([4.0, 1.0, 1.0]).double())) == pytest.approx(2**1.5, rel=1e-6)


@given(st.floats(0.3, 3.0))
def test_alpha_is_the_exponent_of_the_spectrum(alpha):
    ranks = torch.arange(1, 49, dtype=torch.float64)
    assert alpha_req(with_spectrum(100, ranks**-alpha)) == pytest.approx(alpha, rel=1e-4)


def test_collapsed_features():
    collapsed = torch.ones(20, 16) * torch.arange(16)
    assert feature_std(collapsed) == 0.0
    assert effective_rank(collapsed) == pytest.approx(1.0)
    assert math.isnan(alpha_req(collapsed))
    assert feature_std(torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))) == pytest.approx(1, abs=0.02)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=2, num_heads=2)


def test_neighbors_are_compared_with_the_last_measurement(image_folder, encoder):
    measure = FeatureQuality(open_source(str(image_folder)), Preprocess((32, 32)))
    first = measure(encoder)
    assert set(first) == {"effective_rank", "feature_std", "alpha_req"}
    assert encoder.training  # its mode is restored
    second = measure(encoder)
    assert second == first | {"neighbors_kept": 1.0}
    torch.manual_seed(1)
    other = create_encoder("vit_tiny_patch8", img_size=32, embed_dim=32, depth=2, num_heads=2)
    assert measure(other)["neighbors_kept"] < 1.0


def test_fewer_images_if_they_are_large(image_folder, monkeypatch):
    source = open_source(str(image_folder))
    assert FeatureQuality(source, Preprocess((32, 32))).num_images == len(source)
    monkeypatch.setattr(quality, "_MAX_BYTES", 10 * 32 * 32 * 3)
    measure = FeatureQuality(source, Preprocess((32, 32)))
    assert measure.num_images == len(measure.read()) == 10
    assert len(FeatureQuality(source, Preprocess((256, 256))).read()) == quality.LEAST_IMAGES
