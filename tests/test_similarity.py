"""Near duplicates and nearest neighbors: block by block they are those of all pairs at once."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dmjd.similarity
from dmjd.similarity import centered, near_duplicates, nearest_neighbors


def cosines(x: torch.Tensor) -> np.ndarray:
    """All centered cosines in double precision; features at the mean are equal to each other only."""
    difference = x.double().numpy() - x.double().numpy().mean(axis=0)
    length = np.linalg.norm(difference, axis=1, keepdims=True)
    at_mean = length[:, 0] <= 1e-5 * np.linalg.norm(x.double().numpy(), axis=1)
    unit = np.where(at_mean[:, None], 0, difference / np.where(length == 0, 1, length))
    return unit @ unit.T + np.outer(at_mean, at_mean)


def brute_force(cosine: np.ndarray, threshold: float) -> list[int]:
    first: list[int] = []
    for row in range(len(cosine)):
        kept = [other for other in range(row) if first[other] < 0 and cosine[row, other] >= threshold]
        first.append(kept[0] if kept else -1)
    return first


@st.composite
def sets(draw):
    """Features with copies, near copies and a common offset."""
    n, dim = draw(st.integers(2, 40)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    x = rng.normal(size=(draw(st.integers(1, n)), dim))
    x = x[rng.integers(0, len(x), n)] + draw(st.sampled_from([0.0, 0.02, 0.3])) * rng.normal(size=(n, dim))
    return torch.from_numpy(x + draw(st.sampled_from([0.0, 5.0]))).float()


@pytest.fixture(params=[(3, 7), (1024, 1 << 24)], ids=["small blocks", "one block"])
def blocks(request, monkeypatch):
    """Rows of a block, and similarities of a block at once."""
    monkeypatch.setattr(dmjd.similarity, "_ROWS", {"cpu": request.param[0]})
    monkeypatch.setattr(dmjd.similarity, "_AT_ONCE", request.param[1])


@settings(max_examples=150, deadline=None)
@given(x=sets(), threshold=st.sampled_from([0.5, 0.8, 0.95, 0.99]), rows=st.sampled_from([1, 3, 8, 64]))
def test_near_duplicates_are_those_of_all_pairs(x, threshold, rows):
    cosine = cosines(x)
    assume(not (np.abs(cosine - threshold) < 1e-4).any())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmjd.similarity, "_ROWS", {"cpu": rows})
        patch.setattr(dmjd.similarity, "_AT_ONCE", 3 * rows)
        found = near_duplicates(x, threshold).tolist()
    assert found == brute_force(cosine, threshold)
    kept = [row for row, first in enumerate(found) if first < 0]
    assert all(cosine[a, b] < threshold for a in kept for b in kept if a != b)  # no two of them are near duplicates


@settings(max_examples=100, deadline=None)
@given(x=sets(), count=st.integers(1, 5), rows=st.sampled_from([1, 3, 64]))
def test_nearest_neighbors_are_those_of_all_pairs(x, count, rows):
    assume(count < len(x))
    expected = cosines(x)
    np.fill_diagonal(expected, -np.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmjd.similarity, "_ROWS", {"cpu": rows})
        patch.setattr(dmjd.similarity, "_AT_ONCE", 2 * rows)
        values, index = nearest_neighbors(x, count)
    np.testing.assert_allclose(values, -np.sort(-expected, axis=1)[:, :count], atol=2e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, index.numpy(), 1), values, atol=2e-4)
    assert all(row not in others for row, others in enumerate(index.tolist()))


def test_equal_images_are_duplicates_also_if_all_are_and_at_a_threshold_of_one(blocks):
    assert near_duplicates(torch.full((9, 4), 0.3), 1.0).tolist() == [-1, *[0] * 8]
    x = torch.randn(20, 384, generator=torch.Generator().manual_seed(0)) + 3
    assert near_duplicates(x.repeat(3, 1), 1.0).tolist() == [-1] * 20 + [*range(20)] * 2


def test_a_chain_of_similar_images_is_not_one_group(blocks):
    """Neighbors along a circle are similar, its opposite sides are not: every second one is kept."""
    angle = torch.arange(40) * (2 * torch.pi / 40)
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    found = near_duplicates(x, float(np.cos(1.5 * 2 * np.pi / 40))).tolist()
    assert found == [-1 if row % 2 == 0 else row - 1 for row in range(39)] + [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: near_duplicates(torch.ones(1, 3)), "at least two images"),
        (lambda: near_duplicates(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])), "those of row 1 are not"),
        (lambda: near_duplicates(torch.ones(3, 2), 1.5), "threshold must be"),
        (lambda: near_duplicates(torch.ones(3, 2), 0.0), "threshold must be"),
        (lambda: nearest_neighbors(torch.ones(3, 2), 3), "less than the number of images, 3, got 3"),
        (lambda: nearest_neighbors(torch.ones(3, 2), 0), "num_neighbors must be at least 1"),
        (lambda: centered(torch.ones(3)), r"must be \[n, D\]"),
    ],
)
def test_unusable_features_and_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
