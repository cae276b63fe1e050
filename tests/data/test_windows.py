"""The order of a set that is read window by window."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmjd.data.order import permutation
from dmjd.data.windows import ShardWindows, WindowedPermutations

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def order_of(lengths, size, seed=0) -> WindowedPermutations:
    return WindowedPermutations(seed, ShardWindows(tuple(lengths), size, store=None))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 13), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_each_epoch_draws_each_image_once_and_reads_its_windows_in_order(lengths, size, seed, epoch):
    order, n = order_of(lengths, size, seed), sum(lengths)
    numbers = torch.arange(epoch * n, (epoch + 1) * n)
    epochs, indices = order.draw(numbers)
    assert epochs.tolist() == [epoch] * n
    assert sorted(indices.tolist()) == list(range(n))
    windows = [order.window(number) for number in numbers.tolist()]
    assert windows == sorted(windows)
    assert order.window((epoch + 1) * n) == windows[-1] + 1
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    for window, index in zip(windows, indices.tolist(), strict=True):
        assert shard_of[index] in order.shards(window)
    read = [shard for window in sorted(set(windows)) for shard in order.shards(window)]
    assert sorted(read) == [shard for shard, length in enumerate(lengths) if length]
    assert all(len(order.shards(window)) <= size for window in windows)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 13), start=st.integers(0, 50), count=st.integers(1, 40))
def test_a_stretch_does_not_depend_on_where_it_begins(lengths, size, start, count):
    whole = order_of(lengths, size).draw(torch.arange(start + count))
    part = order_of(lengths, size).draw(torch.arange(start, start + count))
    assert all(a[start:].equal(b) for a, b in zip(whole, part, strict=True))


def test_one_window_is_the_order_of_a_set_on_the_disk():
    _, indices = order_of([5, 0, 7, 3], 4).draw(torch.arange(30))
    assert torch.equal(indices, torch.cat([permutation(0, epoch, 15) for epoch in range(2)]))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(order_of([3] * 6, 2, seed).draw(torch.arange(18 * e, 18 * e + 18))[1].tolist())
        for seed in range(3)
        for e in range(3)
    }
    assert len(orders) == 9


def test_the_windows_of_a_subset_hold_its_images_alone():
    windows = ShardWindows((4, 3, 0, 5), 2, store=None).of_rows(np.array([0, 3, 7, 8, 11]))
    assert windows.lengths == (2, 0, 0, 3)


@pytest.mark.parametrize(
    ("size", "batch_size", "is_small"), [(1, 4, False), (1, 5, True), (2, 8, False), (2, 9, True), (3, 99, False)]
)
def test_windows_that_hold_less_than_a_step_are_warned_about(size, batch_size, is_small):
    windows = ShardWindows((3, 0, 5, 4), size, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        windows.warn_if_below(batch_size)
    assert [f"a step takes {batch_size} images" in str(one.message) for one in caught] == [True] * is_small
