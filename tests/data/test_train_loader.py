import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.data.cache import load_to_memory
from dmjd.data.sources.base import Source
from dmjd.data.sources.digits import DigitsSource
from dmjd.data.sources.folder import FolderSource
from dmjd.data.train_loader import Stream, TrainLoader, permutation
from dmjd.data.unreadable import read_or_replace, replace_unreadable, replacement
from dmjd.images.decoding import UnreadableImage
from dmjd.rng import image_keys


class Arrays(Source):
    """Images that tell their index: every pixel of image i is i; those in ``bad`` can't be read."""

    def __init__(self, count, bad=(), shapes=((12, 12),), dtype=np.uint8):
        self.name, self.classes, self.count, self.unreadable, self.shapes, self.dtype = (
            "arrays",
            [],
            count,
            bad,
            shapes,
            dtype,
        )

    def __len__(self):
        return self.count

    def stored(self, index):
        if index in self.unreadable:
            raise UnreadableImage(self.describe(index), "made so")
        scale = 1 if self.dtype == np.uint8 else 1 / 255
        return np.full((*self.shapes[index % len(self.shapes)], 3), index % 256 * scale, self.dtype)

    def describe(self, index):
        return f"image {index}"


MIXED = ((12, 12), (9, 15), (20, 11))  # sizes that keep a set out of memory


@pytest.fixture
def noise_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(23):
        size = rng.integers(20, 40, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_text("words")
    return FolderSource(tmp_path)


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def images(batches):
    return torch.cat([b.images for b in batches])


def keys(batches):
    return torch.cat([b.keys for b in batches])


def test_permutation_is_one_and_differs_by_epoch_and_seed():
    for n in (1, 2, 1000):
        assert torch.equal(permutation(0, 3, n).sort().values, torch.arange(n))
    orders = [tuple(permutation(seed, epoch, 50).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 40),
    per_process=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 3),
    start=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_ranks_and_micro_batches_join_to_the_one_stream(length, per_process, accumulate, world_size, start, seed):
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


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 50), batch_size=st.integers(1, 60))
def test_no_image_is_lost_or_doubled_in_an_epoch(length, batch_size):
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
def test_uneven_shares_are_refused(batch_size, accumulate, world_size):
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


def test_same_bits_for_any_workers_and_any_start(noise_folder):
    def loader(workers):
        return TrainLoader(noise_folder, img_size=(16, 12), batch_size=8, accumulate=2, seed=3, num_workers=workers)

    straight = take(loader(0), 16)
    assert not loader(0).in_memory
    for workers, start in [(2, 0), (2, 5), (1, 3), (0, 7)]:
        resumed = take(loader(workers), 16 - 2 * start, start)
        assert torch.equal(images(resumed), images(straight[2 * start :]))
        assert torch.equal(keys(resumed), keys(straight[2 * start :]))
        assert [b.unreadable for b in resumed] == [b.unreadable for b in straight[2 * start :]]


@pytest.mark.parametrize("in_memory", [True, False])
def test_ranks_and_accumulation_give_the_images_of_one_process(in_memory, noise_folder):
    source = DigitsSource("test") if in_memory else noise_folder
    options = {"img_size": (24, 20), "batch_size": 24, "seed": 1, "num_workers": 0}
    whole = take(TrainLoader(source, **options), 4, start=2)
    parts = [
        take(TrainLoader(source, **options, accumulate=2, rank=rank, world_size=3), 8, start=2) for rank in range(3)
    ]
    joined = [batch for group in zip(*parts, strict=True) for batch in group]
    assert torch.equal(images(joined), images(whole))
    assert torch.equal(keys(joined), keys(whole))


class Noise(Arrays):
    """Images in which a crop and its mirror image differ."""

    def stored(self, index):
        return np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def test_half_of_the_images_are_mirrored_unless_flip_is_off():
    options = {"img_size": (12, 10), "batch_size": 16}
    plain = take(TrainLoader(Noise(16), **options, flip=False), 1)[0].images
    mirrored = take(TrainLoader(Noise(16), **options, flip=True), 1)[0].images
    same = (plain == mirrored).flatten(1).all(1)
    assert 2 < same.sum() < 14
    assert torch.equal(plain[~same].flip(-1), mirrored[~same])


@pytest.mark.parametrize("shapes", [((12, 12),), MIXED])
def test_bad_images_are_replaced_by_what_their_key_names(shapes):
    bad = (3, 4, 17)
    batches = take(TrainLoader(Arrays(20, bad, shapes), img_size=(8, 8), batch_size=10, num_workers=0), 4)
    seen, all_keys = images(batches)[:, 0, 4, 4].long(), keys(batches)
    drawn = torch.cat([permutation(0, epoch, 20) for epoch in range(2)])
    assert torch.equal(all_keys, image_keys(0, torch.arange(40) // 20, drawn))
    for index, key, shown in zip(drawn.tolist(), all_keys, seen.tolist(), strict=True):
        attempt = 0
        while index in bad:
            index = int(replacement(key[None], attempt, 20))
            attempt += 1
        assert shown == index
    reported = Counter(name for b in batches for name, _ in b.unreadable)
    assert set(reported) == {"image 3", "image 4", "image 17"}


def test_both_replacement_rules_are_one():
    readable = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.4
    all_keys = torch.arange(200) * 1_000_003
    indices = all_keys % 50

    def read(index):
        if not readable[index]:
            raise UnreadableImage(str(index), "made so")
        return np.array(index)

    one_by_one = [
        int(read_or_replace(read, i, k, 50)[0]) for i, k in zip(indices.tolist(), all_keys.tolist(), strict=True)
    ]
    assert replace_unreadable(indices, all_keys, readable).tolist() == one_by_one


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_and_not_a_hang(workers):
    loader = TrainLoader(Arrays(5, bad=range(5)), img_size=(8, 8), batch_size=2, num_workers=workers)
    with pytest.raises(UnreadableImage, match="made so; and every image tried in its place is unreadable"):
        next(loader.batches(0))


def test_in_memory_reports_bad_images_up_front():
    loader = TrainLoader(Arrays(200, bad=[0, 7]), img_size=(8, 8), batch_size=2)
    assert loader.in_memory
    assert loader.unreadable == [("image 0", "made so"), ("image 7", "made so")]


def test_one_odd_image_keeps_the_set_out_of_memory():
    source = Arrays(2000)
    source.shapes = [(12, 12)] * 1999 + [(12, 13)]
    assert load_to_memory(source) is None


def test_large_images_are_held_in_memory_only_for_a_gpu():
    source = Arrays(3, shapes=((100, 100),))
    assert load_to_memory(source) is not None
    assert not TrainLoader(source, img_size=(8, 8), batch_size=3, num_workers=0).in_memory


def test_one_image():
    (batch,) = take(TrainLoader(Arrays(1), img_size=(8, 8), batch_size=4), 1)
    assert batch.images.shape == (4, 3, 8, 8)
    assert len(set(batch.keys.tolist())) == 4


def test_global_random_state_is_left_alone(noise_folder):
    states = []
    for workers in (0, 2):
        torch.manual_seed(0)
        take(TrainLoader(noise_folder, img_size=(8, 8), batch_size=4, num_workers=workers), 2)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


def children():
    """Ids of the worker processes of this one."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(pid) for pid in listed.stdout.split() if os.path.exists(f"/proc/{pid}")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_ends_the_workers_and_interrupts_do_not(noise_folder):
    batches = TrainLoader(noise_folder, img_size=(8, 8), batch_size=4, num_workers=2).batches(0)
    before = children()
    next(batches)
    workers = {pid for pid in children() - before if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    assert len(workers) >= 2
    for pid, name in itertools.product(workers, ["INT", "TERM"]):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)  # from another process, as a cluster does
    for _ in range(20):
        next(batches)
    batches.close()
    deadline = time.time() + 10
    while workers & children() and time.time() < deadline:
        time.sleep(0.05)
    assert not workers & children()


SCRIPT = """
import sys
from dmjd.data.sources.folder import FolderSource
from dmjd.data.train_loader import TrainLoader
from pathlib import Path
batches = TrainLoader(FolderSource(Path(sys.argv[1])), img_size=(8, 8), batch_size=4, num_workers=2).batches(0)
next(batches)
print("ready", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("as planned")
"""


@pytest.mark.parametrize("end", ["return", "raise"])
def test_a_process_ends_with_a_live_iterator(noise_folder, end):
    """Neither a normal end nor an exception may hang on workers that ignore signals."""
    began = time.time()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(noise_folder.root), end], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "ready\n"
    assert run.returncode == (1 if end == "raise" else 0)
    assert time.time() - began < 30


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
