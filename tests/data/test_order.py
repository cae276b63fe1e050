"""Permutations and interleaving: shares in every stretch of samples, no repetition before all images were drawn."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd.data.order import Interleaving, Part, Permutations, shares
from dmjd.data.train_loader import Stream
from dmjd.rng import image_keys

lengths = st.integers(1, 300)


@st.composite
def mixtures(draw, most=5):
    """Two or more parts: without weights, all with weights, or some."""
    count = draw(st.integers(2, most))
    weights = [draw(st.none() | st.floats(1e-4, 1)) for _ in range(count)]
    total = sum(w for w in weights if w is not None) * (1 if None not in weights else 1.1)
    return [Part(draw(lengths), None if w is None else w / total) for w in weights]


def drawn(parts, numbers, **settings):
    """(source, index in the source, key) of samples."""
    stream = Stream(sum(part.length for part in parts), 6, parts=tuple(parts), **settings)
    indices, keys = stream.draw(numbers)
    ends = np.cumsum([part.length for part in parts])
    sources = np.searchsorted(ends, indices.numpy(), side="right")
    return sources, indices.numpy() - (ends - [part.length for part in parts])[sources], keys


@pytest.mark.parametrize(
    ("length", "batch_size", "seed", "digest"),
    [(7, 5, 3, "cf1813ef438d6004"), (1000, 64, 0, "5e1a211b96d5c906"), (1, 4, 1, "776627f4d487c162")],
)
def test_a_single_source_keeps_the_order_of_former_versions(length, batch_size, seed, digest):
    """Digests of indices and keys of steps 9 to 11, as version 0.1 drew them."""
    stream = Stream(length, batch_size, seed=seed)
    indices, keys = stream.draw(*itertools.islice(stream.micro_batches(9), 3))
    assert hashlib.sha256(indices.numpy().tobytes() + keys.numpy().tobytes()).hexdigest()[:16] == digest


@settings(max_examples=60, deadline=None)
@given(parts=mixtures(most=2), start=st.integers(0, 10**12), length=st.integers(1, 2000))
def test_of_two_sources_each_has_its_share_of_any_stretch_to_within_one(parts, start, length):
    sources, _ = Interleaving(parts).place(torch.arange(start, start + length))
    wanted = length * torch.tensor(shares(parts))
    assert ((torch.bincount(sources, minlength=2) - wanted).abs() < 1.001).all()


@settings(max_examples=60, deadline=None)
@given(parts=mixtures(most=8), start=st.integers(0, 10**12), length=st.integers(1, 2000))
def test_of_more_sources_to_within_four(parts, start, length):
    interleaving = Interleaving(parts)
    sources, ordinals = interleaving.place(torch.arange(start, start + length))
    wanted = length * torch.tensor(shares(parts))
    assert ((torch.bincount(sources, minlength=len(parts)) - wanted).abs() < 3.36).all()
    for source in sources.unique():  # no sample of a source is left out or drawn twice
        mine = ordinals[sources == source]
        assert torch.equal(mine, torch.arange(int(mine[0]), int(mine[0]) + len(mine)))
    first, _ = interleaving.place(torch.arange(length))
    assert ((torch.bincount(first, minlength=len(parts)) - wanted).abs() < 1.68).all()  # without a start, half


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(lengths, min_size=2, max_size=5), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**31))
def test_without_weights_each_image_is_drawn_once_in_an_epoch(sizes, epoch, seed):
    parts, total = [Part(size) for size in sizes], sum(sizes)
    stream = Stream(total, 1, seed=seed, parts=tuple(parts))
    indices, keys = stream.draw(range(epoch * total, (epoch + 1) * total))
    assert torch.equal(indices.sort().values, torch.arange(total))
    assert torch.equal(keys, image_keys(seed, torch.full_like(indices, epoch), indices))


@settings(max_examples=40, deadline=None)
@given(parts=mixtures(), count=st.integers(1, 3000), seed=st.integers(0, 2**31))
def test_no_image_is_repeated_before_all_of_its_source_were_drawn(parts, count, seed):
    sources, inside, keys = drawn(parts, range(count), seed=seed)
    for number, part in enumerate(parts):
        mine = inside[sources == number]
        for start in range(0, len(mine), part.length):
            epoch = mine[start : start + part.length]
            assert len(set(epoch.tolist())) == len(epoch)
    assert len(set(keys.tolist())) == count  # a repeated image gets new crops and masks


@settings(max_examples=40, deadline=None)
@given(
    parts=mixtures(),
    per_process=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 3),
    start=st.integers(0, 10**6),
    at_once=st.integers(1, 4),
)
def test_a_sample_does_not_depend_on_how_it_is_drawn(parts, per_process, accumulate, world_size, start, at_once):
    """Nor on batch size, micro-batches, processes, the first step, or how many are drawn together."""
    batch_size, length = per_process * accumulate * world_size, sum(part.length for part in parts)
    first = start * batch_size
    numbers = range(first, first + 3 * batch_size)
    expected = Stream(length, 1, parts=tuple(parts)).draw(numbers)
    found = [torch.empty_like(x) for x in expected]
    for rank in range(world_size):
        stream = Stream(length, batch_size, accumulate, 0, rank, world_size, tuple(parts))
        slices = list(itertools.islice(stream.micro_batches(start), 3 * accumulate))
        for some in (slices[i : i + at_once] for i in range(0, len(slices), at_once)):
            here = torch.cat([torch.arange(part.start, part.stop) for part in some]) - first
            for whole, values in zip(found, stream.draw(*some), strict=True):
                whole[here] = values
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        (Part(3), Part(1_000_000)),
        (Part(1, 0.5), Part(1_000_000)),
        (Part(1_000_000), Part(5, 1e-9)),
        (Part(1, 0.5), Part(1, 0.5)),
    ],
)
def test_extreme_mixtures(parts):
    for start in (0, 10**9):
        sources, inside, _ = drawn(parts, range(start, start + 20_000))
        for number, (part, share) in enumerate(zip(parts, shares(parts), strict=True)):
            mine = inside[sources == number]
            assert abs(len(mine) - share * 20_000) < 1.001
            times = np.bincount(mine, minlength=part.length)
            assert start or times.max() - times.min() <= 1


def test_shares():
    assert shares([Part(10), Part(30)]) == [0.25, 0.75]
    assert shares([Part(10, 0.3), Part(30), Part(10)]) == pytest.approx([0.3, 0.525, 0.175])
    assert shares([Part(10, 0.2), Part(30, 0.2)]) == [0.5, 0.5]


def test_sources_of_one_size_have_orders_of_their_own():
    one, other = (Permutations(0, 50, first).draw(torch.arange(50))[1] for first in (0, 50))
    assert not torch.equal(one, other - 50)


def test_only_two_orders_are_kept():
    order = Permutations(0, 100)
    for start in range(0, 1000, 60):
        order.draw(torch.arange(start, start + 60))
        assert len(order._recent) <= 2
