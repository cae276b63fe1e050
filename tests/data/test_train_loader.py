"""The stream of training images: order, crops, flips, replacement and resume."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import MIXED, Arrays

from dmjd.data.cache import load_to_memory
from dmjd.data.order import permutation
from dmjd.data.train_loader import Stream, TrainLoader
from dmjd.data.unreadable import replacement
from dmjd.images.stored import UnreadableImage
from dmjd.rng import image_keys


class Noise(Arrays):
    """Random images: no two crops are equal."""

    def stored(self, index):
        return np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def images(batches):
    return torch.cat([b.images for b in batches])


def keys(batches):
    return torch.cat([b.keys for b in batches])


def test_permutations_differ_by_epoch_and_seed():
    for n in (1, 2, 1000):
        assert torch.equal(permutation(0, 3, n).sort().values, torch.arange(n))
    orders = [tuple(permutation(seed, epoch, 50).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40),
    per_process=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 3),
    start=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_ranks_and_micro_batches_together_give_one_stream(length, per_process, accumulate, world_size, start, seed):
    batch_size = per_process * accumulate * world_size
    whole = Stream(length, batch_size, seed=seed)
    parts = [Stream(length, batch_size, accumulate, seed, rank, world_size) for rank in range(world_size)]
    steps = 3
    expected = [
        torch.cat(x) for x in zip(*map(whole.draw, itertools.islice(whole.micro_batches(start), steps)), strict=True)
    ]
    streams = [part.micro_batches(start) for part in parts]
    drawn = [part.draw(next(s)) for _ in range(steps * accumulate) for part, s in zip(parts, streams, strict=True)]
    joined = [torch.cat(x) for x in zip(*drawn, strict=True)]
    assert torch.equal(joined[0], expected[0])
    assert torch.equal(joined[1], expected[1])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 50), batch_size=st.integers(1, 60))
def test_no_image_is_lost_or_repeated_in_an_epoch(length, batch_size):
    stream = Stream(length, batch_size)
    steps = -(-3 * length // batch_size)
    indices, drawn_keys = zip(*map(stream.draw, itertools.islice(stream.micro_batches(0), steps)), strict=True)
    indices, drawn_keys = torch.cat(indices)[: 3 * length], torch.cat(drawn_keys)[: 3 * length]
    for epoch in range(3):
        part = slice(epoch * length, (epoch + 1) * length)
        assert torch.equal(indices[part].sort().values, torch.arange(length))
        assert torch.equal(drawn_keys[part], image_keys(0, torch.full((length,), epoch), indices[part]))
    assert len(set(drawn_keys.tolist())) == 3 * length


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), [(0, 1, 1), (10, 4, 1), (10, 1, 3), (12, 2, 4)])
def test_uneven_batches_are_refused(batch_size, accumulate, world_size):
    with pytest.raises(ValueError, match="make it a multiple of"):
        Stream(100, batch_size, accumulate, 0, 0, world_size)


@pytest.mark.parametrize("shapes", [((12, 12),), MIXED])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_are_those_of_the_keys(shapes, dtype):
    loader = TrainLoader(Arrays(30, shapes=shapes, dtype=dtype), img_size=(8, 10), batch_size=10, num_workers=0)
    assert loader.in_memory == (len(shapes) == 1)
    batches = take(loader, 6)
    assert batches[0].images.shape == (10, 3, 8, 10)
    assert batches[0].images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    for epoch in range(2):
        half = batches[3 * epoch : 3 * epoch + 3]
        seen = images(half)[:, 0, 4, 4].round().long()
        assert torch.equal(seen.sort().values, torch.arange(30))
        assert torch.equal(keys(half), image_keys(0, torch.full((30,), epoch), seen))


def test_same_bits_for_any_number_of_workers_and_any_start(noise_folder):
    def loader(workers):
        return TrainLoader(noise_folder, img_size=(16, 12), batch_size=8, accumulate=2, seed=3, num_workers=workers)

    straight = take(loader(0), 16)
    assert not loader(0).in_memory
    for workers, start in [(2, 0), (1, 5), (0, 7)]:
        resumed = take(loader(workers), 16 - 2 * start, start)
        assert torch.equal(images(resumed), images(straight[2 * start :]))
        assert torch.equal(keys(resumed), keys(straight[2 * start :]))
        assert [b.unreadable for b in resumed] == [b.unreadable for b in straight[2 * start :]]


@pytest.mark.parametrize("in_memory", [True, False])
def test_ranks_and_accumulation_give_the_images_of_one_process(in_memory, noise_folder):
    source = Noise(40) if in_memory else noise_folder
    options = {"img_size": (24, 20), "batch_size": 24, "seed": 1, "num_workers": 0}
    whole = take(TrainLoader(source, **options), 4, start=2)
    parts = [
        take(TrainLoader(source, **options, accumulate=2, rank=rank, world_size=3), 8, start=2) for rank in range(3)
    ]
    joined = [batch for group in zip(*parts, strict=True) for batch in group]
    assert torch.equal(images(joined), images(whole))
    assert torch.equal(keys(joined), keys(whole))


def test_half_of_the_images_are_flipped_unless_flip_is_off():
    options = {"img_size": (12, 10), "batch_size": 16}
    plain = take(TrainLoader(Noise(16), **options, flip=False), 1)[0].images
    flipped = take(TrainLoader(Noise(16), **options, flip=True), 1)[0].images
    same = (plain == flipped).flatten(1).all(1)
    assert 2 < same.sum() < 14
    assert torch.equal(plain[~same].flip(-1), flipped[~same])


@pytest.mark.parametrize("shapes", [((12, 12),), MIXED])
def test_unreadable_images_are_replaced_by_those_of_their_keys(shapes):
    unreadable = (3, 4, 17)
    batches = take(TrainLoader(Arrays(20, unreadable, shapes), img_size=(8, 8), batch_size=10, num_workers=0), 4)
    seen, all_keys = images(batches)[:, 0, 4, 4].long(), keys(batches)
    drawn = torch.cat([permutation(0, epoch, 20) for epoch in range(2)])
    assert torch.equal(all_keys, image_keys(0, torch.arange(40) // 20, drawn))
    for index, key, shown in zip(drawn.tolist(), all_keys, seen.tolist(), strict=True):
        attempt = 0
        while index in unreadable:
            index = int(replacement(torch.tensor([index]), key[None], attempt, 20))
            attempt += 1
        assert shown == index
    reported = Counter(name for b in batches for name, _ in b.unreadable)
    assert set(reported) == {"image 3", "image 4", "image 17"}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_and_not_a_hang(workers):
    loader = TrainLoader(Arrays(5, range(5)), img_size=(8, 8), batch_size=2, num_workers=workers)
    with pytest.raises(UnreadableImage, match="made so; and every image tried in its place is unreadable"):
        next(loader.batches(0))


def test_in_memory_sets_report_unreadable_images_at_once():
    loader = TrainLoader(Arrays(200, [0, 7]), img_size=(8, 8), batch_size=2)
    assert loader.in_memory
    assert loader.unreadable == [("image 0", "made so"), ("image 7", "made so")]


def test_large_images_are_held_in_memory_only_for_a_gpu():
    source = Arrays(3, shapes=((100, 100),))
    assert load_to_memory(source) is not None
    assert not TrainLoader(source, img_size=(8, 8), batch_size=3, num_workers=0).in_memory


def test_one_image():
    (batch,) = take(TrainLoader(Arrays(1), img_size=(8, 8), batch_size=4), 1)
    assert batch.images.shape == (4, 3, 8, 8)
    assert len(set(batch.keys.tolist())) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shapes", [((12, 12),), MIXED])
def test_cuda_gives_the_images_of_the_cpu(shapes):
    options = {"img_size": (8, 8), "batch_size": 8, "num_workers": 0}
    on_cpu = take(TrainLoader(Arrays(20, [3], shapes), **options), 5)
    on_cuda = take(TrainLoader(Arrays(20, [3], shapes), **options, device=torch.device("cuda")), 5)
    assert on_cuda[0].images.is_cuda
    assert torch.equal(images(on_cuda).cpu(), images(on_cpu))
    assert torch.equal(keys(on_cuda).cpu(), keys(on_cpu))
