"""Sets that grow: what joins when, the order of the epochs, and the record."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import save
from PIL import Image

from dmjd.data.growth import GROWTH_FILE, Growth, WithJoined, read_segments
from dmjd.data.order import GrowingPermutations, Joined, Part, Permutations
from dmjd.data.sources.digits import DigitsSource
from dmjd.data.sources.registry import check_may_grow, open_source
from dmjd.data.train_loader import Augment, CroppedImages, Stream, TrainLoader
from dmjd.rng import image_keys


def folder(path: Path, names) -> Path:
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        save(path / name, value=10 * i)
    return path


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.integers(1, 60))
def test_a_set_to_which_nothing_joins_has_the_order_of_any_other(length, first, start, count):
    looked = []
    growing = GrowingPermutations(7, length, first, looked.append)
    ordinals = torch.arange(start * length, start * length + count)
    growing.reach(int(ordinals[0]), int(ordinals[-1]))
    for mine, plain in zip(growing.draw(ordinals), Permutations(7, length, first).draw(ordinals), strict=True):
        assert torch.equal(mine, plain)
    last = int(ordinals[-1]) // length
    assert looked == list(range(max(0, (int(ordinals[0]) - 1)) // length + 1, last + 1))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 7))
def test_each_epoch_holds_each_image_that_has_joined_once(joining, batch):
    order = GrowingPermutations(0, 3, 0, lambda epoch: None)
    lengths, total = [3], 3
    for epoch, count in enumerate(joining, start=1):
        order.join(Joined(epoch, total, count))
        total += count
        lengths.append(total)
    drawn = []
    for begin in range(0, sum(lengths), batch):
        ordinals = torch.arange(begin, min(begin + batch, sum(lengths)))
        drawn += zip(*(x.tolist() for x in order.draw(ordinals)), strict=True)
    for epoch, length in enumerate(lengths):
        assert sorted(index for e, index in drawn if e == epoch) == list(range(length))


def draw_all(stream, steps, start=0):
    requests = stream.micro_batches(start)
    return [stream.draw(next(requests)) for _ in range(steps)]


def test_new_images_join_at_the_next_epoch_and_a_resumed_run_draws_the_same(tmp_path):
    root, file = folder(tmp_path / "set", ["a.png", "b.png", "c.png", "d.png"]), tmp_path / GROWTH_FILE
    source, said = open_source(root), []
    stream = Stream(4, 2, growth=Growth(source, [4], 0, file, say=said.append))
    first = draw_all(stream, 1)
    folder(root, ["new/e.png", "0.png"])  # while epoch 0 lasts
    first += draw_all(stream, 1, 1)
    assert stream.growth.count == 0
    (root / "a.png").unlink()  # an image that is removed stays in the order
    first += draw_all(stream, 4, 2)
    assert said == [f"epoch 1 of {root}: 2 new image(s) join, 6 in all"]
    assert sorted(torch.cat([first[i][0] for i in (2, 3, 4)]).tolist()) == list(range(6))
    assert stream.growth.among(np.array([0, 4, 5])) == {4: (0, f"{root}/0.png"), 5: (0, f"{root}/new/e.png")}

    for looking in (True, False):
        folder(root, [f"{looking}.png"])  # too late for epochs that were begun
        again = Stream(4, 2, growth=Growth(source, [4], 0, file, looking=looking))
        for (indices, keys), (i, k) in zip(first[2:5], draw_all(again, 3, 2), strict=True):
            assert torch.equal(indices, i)
            assert torch.equal(keys, k)
            assert torch.equal(keys, image_keys(0, torch.ones_like(i), i))
        resumed = Stream(4, 2, growth=Growth(source, [4], 0, file, looking=looking))
        assert torch.equal(draw_all(resumed, 1, 5)[0][0], first[5][0])  # epoch 2 had begun
        draw_all(resumed, 4, 6)
        assert resumed.growth.count == 3  # of both: the first one looked at epoch 3


def test_processes_look_at_the_same_step(tmp_path):
    """The share of one process may begin a new epoch earlier than that of another."""
    root = folder(tmp_path / "set", [f"{i}.png" for i in range(5)])
    looked = []
    for rank in range(2):
        asked = []
        growth = Growth(
            open_source(root),
            [5],
            0,
            tmp_path / f"{rank}.jsonl",
            from_first=lambda make, asked=asked: asked.append(1) or make(),
        )
        stream = Stream(5, 4, rank=rank, world_size=2, growth=growth)
        requests, times = stream.micro_batches(0), []
        for _ in range(6):
            stream.draw(next(requests))
            times.append(len(asked))
        looked.append(times)
    assert looked[0] == looked[1] == [1, 2, 3, 4, 4, 5]


def test_images_that_join_are_read_by_workers(tmp_path):
    """Those that cannot be read are replaced by images of the start, by any number of workers."""
    root = folder(tmp_path / "set", [f"{i}.png" for i in range(6)])
    source = open_source(root)
    (root / "x.png").write_bytes(b"nothing")
    save(root / "y.png", value=250)
    seen = []
    for workers in (0, 2):
        growth = Growth(source, [6], 0, tmp_path / f"{workers}.jsonl")
        loader = TrainLoader(source, img_size=(4, 4), batch_size=2, num_workers=workers, growth=growth)
        batches = loader.batches()
        seen.append([next(batches) for _ in range(7)])
        batches.close()
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.unreadable == other.unreadable
    values = [int(x) for batch in seen[0][3:] for x in batch.images[:, 0, 0, 0]]
    assert values.count(250) == 1
    assert [name for batch in seen[0] for name, _ in batch.unreadable] == [f"{root}/x.png"]


@pytest.mark.parametrize(("kind", "chans"), [("png", 3), ("jpg", 3), ("png", 1)])
def test_a_set_that_fits_into_memory_has_the_same_pixels_there_and_in_workers(kind, chans, tmp_path):
    """Damaged images, and 16-bit ones, whose crops have one channel, too."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    root.mkdir()
    for i in range(10):
        noise = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(noise if chans == 3 else noise[..., 0].astype(np.uint16) * 257).save(root / f"{i}.{kind}")
    damaged = (root / f"3.{kind}").read_bytes()
    (root / f"3.{kind}").write_bytes(damaged[: len(damaged) // 2])
    source, taken = open_source(root, in_chans=chans), []
    for growth in (None, Growth(source, [10], 0, tmp_path / GROWTH_FILE)):
        loader = TrainLoader(source, img_size=(24, 20), batch_size=5, num_workers=0, growth=growth)
        assert loader.in_memory == (growth is None)
        batches = loader.batches()
        taken.append([next(batches) for _ in range(4)])
    for held, read in zip(*taken, strict=True):
        assert torch.equal(held.images, read.images)
        assert (held.images.dtype, held.images.stride()) == (read.images.dtype, read.images.stride())
        assert torch.equal(held.keys, read.keys)
        assert set(held.unreadable) == set(read.unreadable)
    assert sum(len(batch.unreadable) for batch in taken[0]) == 2


def test_large_images_may_join_a_set_that_fits_into_memory(tmp_path):
    """They are cropped as they are in any other set, and the rest of their batch does not change."""
    root = folder(tmp_path / "set", [f"{i}.png" for i in range(6)])
    source = open_source(root)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 120, 3), dtype=np.uint8)).save(root / "x.png")
    (tmp_path / GROWTH_FILE).write_text('{"epoch": 1, "paths": ["x.png"]}\n')
    growth = Growth(source, [6], 0, tmp_path / GROWTH_FILE)
    batches = TrainLoader(source, img_size=(8, 8), batch_size=13, num_workers=0, growth=growth).batches()
    batch = next(batches)
    joined = WithJoined(source, growth.sources, growth.among(np.array([6])))
    _, keys = Stream(6, 13, growth=growth).draw(range(13))
    assert torch.equal(batch.keys, keys)
    alone = CroppedImages(joined, Augment((8, 8), (0.5, 1.0), True))
    key = image_keys(0, torch.tensor([1]), torch.tensor([6]))
    assert torch.equal(batch.images[batch.keys == key], alone((np.array([6]), key.numpy()))[0])
    without = TrainLoader(source, img_size=(8, 8), batch_size=6, num_workers=0)
    assert torch.equal(batch.images[:6], next(without.batches()).images)


def test_a_list_grows_by_rows_whose_files_exist(tmp_path):
    folder(tmp_path / "one", ["a.png", "b.png"])
    folder(tmp_path, ["two/c.png"])
    rows = "path,split\none/a.png,train\none/b.png,train\n"
    (tmp_path / "list.csv").write_text(rows)
    source = open_source(tmp_path / "list.csv")
    rows += "two/c.png,train\ntwo/later.png,train\none/a.png,train\n"
    (tmp_path / "list.csv").write_text(rows)
    growth = Growth(source, [2], 0, tmp_path / GROWTH_FILE)
    draw_all(Stream(2, 2, growth=growth), 2)
    assert growth.among(np.arange(9)[:3]) == {2: (0, f"{tmp_path}/two/c.png")}
    folder(tmp_path, ["two/later.png"])
    draw_all(Stream(2, 1, growth=growth), 6)
    again = Growth(source, [2], 0, tmp_path / GROWTH_FILE, looking=False)
    assert again.among(np.arange(4)) == {2: (0, f"{tmp_path}/two/c.png"), 3: (0, f"{tmp_path}/two/later.png")}


def test_the_sources_of_a_mixture_grow_one_by_one(tmp_path):
    one, two = folder(tmp_path / "A", [f"{i}.png" for i in range(4)]), folder(tmp_path / "B", ["0.png", "1.png"])
    source = open_source([str(one), f"{two}:0.5"])
    folder(two, ["2.png"])
    growth = Growth(source, [4, 2], 0, tmp_path / GROWTH_FILE)
    stream = Stream(6, 2, parts=(Part(4), Part(2, 0.5)), growth=growth)
    drawn = torch.cat([indices for indices, _ in draw_all(stream, 5)]).tolist()
    assert sorted(i for i in drawn if i in (4, 5, 6)) == [4, 4, 5, 5, 6]  # an epoch of two, then one of three
    folder(one, ["x.png"])
    draw_all(stream, 4, 5)
    assert growth.among(np.array([6, 7])) == {6: (1, f"{two}/2.png"), 7: (0, f"{one}/x.png")}


def test_a_folder_that_cannot_be_listed_does_not_end_the_run(tmp_path):
    root, warned = folder(tmp_path / "set", ["a.png", "b.png"]), []
    growth = Growth(open_source(root), [2], 0, tmp_path / GROWTH_FILE, warn=warned.append)
    root.rename(tmp_path / "gone")
    draw_all(Stream(2, 2, growth=growth), 4)
    assert len(warned) == 1
    assert "no new images are looked for" in warned[0]
    (tmp_path / "gone").rename(root)
    folder(root, ["c.png"])
    draw_all(Stream(2, 2, growth=growth), 1, 4)
    assert growth.count == 1


def test_a_damaged_record_is_named(tmp_path):
    file = tmp_path / GROWTH_FILE
    file.write_text('{"epoch": 1, "paths": ["a.png"]}\n{"epoch": 2, "pa')  # cut short by a kill: it was not used
    assert [segment.paths for segment in read_segments(file)] == [["a.png"]]
    assert file.read_text().endswith("}\n")
    huge = '{"epoch": 99999999999999999999, "paths": ["a.png"]}'
    for line in ("{", huge, "[]"):
        file.write_text(f'{{"epoch": 1, "paths": []}}\n{line}\n')
        with pytest.raises(ValueError, match="line 2"):
            read_segments(file)
    file.write_text('{"epoch": 1, "paths": ["../a.png"]}\n')
    with pytest.raises(ValueError, match="outside"):
        read_segments(file)
    file.write_text('{"epoch": 1, "paths": [], "source": 3}\n')
    root = folder(tmp_path / "set", ["a.png"])
    with pytest.raises(ValueError, match="other sources"):
        Growth(open_source(root), [1], 0, file)
    file.write_text(2 * '{"epoch": 1, "paths": ["b.png"]}\n')
    with pytest.raises(ValueError, match=r"joined.jsonl is damaged: images join at epoch 1"):
        Growth(open_source(root), [1], 0, file)


def test_sets_that_do_not_grow_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"digits is .*: leave it out"):
        check_may_grow(["digits"])
    with pytest.raises(ValueError, match="does not grow"):
        Growth(DigitsSource(), [10], 0, tmp_path / GROWTH_FILE)
    check_may_grow(str(folder(tmp_path / "set", ["a.png"])))


def crops(sets, nodata, count, tmp_path, batch_size, **settings):
    """Crop and unreadable images by key, of a set to which images join after the first epoch."""
    source = open_source(sets, nodata=nodata)
    growth = Growth(source, [part.length for part in source.parts] or [len(source)], 0, tmp_path / GROWTH_FILE)
    loader = TrainLoader(source, img_size=(8, 8), batch_size=batch_size, num_workers=0, growth=growth, **settings)
    batches, found = loader.batches(), []
    for _ in range(count // batch_size):
        batch = next(batches)
        found += zip(batch.keys.tolist(), batch.images, strict=True)
    return dict(found)


def test_crops_prefer_the_valid_area_whatever_joined_in_the_batch(tmp_path):
    """Of images that have joined, too, and in batches of any size."""
    root = tmp_path / "set"
    half = np.random.default_rng(0).integers(1, 255, (40, 40, 3), dtype=np.uint8)
    half[:, 14:] = 0
    for i in range(8):
        root.mkdir(exist_ok=True)
        Image.fromarray(half).save(root / f"{i}.png")
    (tmp_path / GROWTH_FILE).write_text('{"epoch": 1, "paths": ["6.png", "7.png"]}\n')
    (tmp_path / "list.txt").write_text("".join(f"set/{i}.png\n" for i in range(6)))
    settings = {"nodata": "0", "count": 6 + 8 + 2, "tmp_path": tmp_path, "crop_scale": (0.1, 0.3)}
    single, all_at_once = (crops(tmp_path / "list.txt", batch_size=size, **settings) for size in (1, 8))
    for key, image in single.items():
        torch.testing.assert_close(all_at_once[key], image, rtol=0, atol=0, equal_nan=True)
    assert min(float(image.isfinite().float().mean()) for image in single.values()) > 0.3


def test_what_joined_is_replaced_within_its_source(tmp_path):
    """Others of the batch, too: what replaces an image does not depend on those around it."""
    one, two = folder(tmp_path / "A", [f"{i}.png" for i in range(9)]), folder(tmp_path / "B", ["0.png", "1.png"])
    (two / "1.png").write_bytes(b"nothing")
    source = open_source([str(one), f"{two}:0.5"])
    joined = WithJoined(source, source.sources, {11: (1, f"{two}/x\n.png"), 12: (0, f"{one}/x.png")})
    read = CroppedImages(joined, Augment((4, 4), (0.5, 1.0), False))
    keys = np.arange(40)
    for index, first, last in ((10, 9, 9), (11, 9, 9), (12, 0, 8)):
        images, _, reports = read((np.full(40, index), keys))
        assert set(images[:, 0, 0, 0].tolist()) <= {10 * i % 90 for i in range(first, last + 1)}
        assert {joined.describe(index)} <= {name for name, _ in reports}


def test_images_in_a_batch_have_names(tmp_path):
    root = folder(tmp_path / "set", ["a.png", "b.png"])
    source = open_source(root)
    joined = WithJoined(source, [source], {2: (0, f"{root}/b.png")})
    assert [joined.describe(i) for i in (0, 2)] == [f"{root}/a.png", f"{root}/b.png"]
    assert (len(joined), joined.stored(2), joined.stored(0)) == (2, root / "b.png", root / "a.png")
    assert np.array_equal(joined.read(2), source.read(1))
    assert np.array_equal(joined.read(0), source.read(0))


def test_a_test_folder_that_comes_later_does_not_join(tmp_path):
    root = folder(tmp_path / "set", ["a.png"])
    source = open_source(root)
    folder(root, ["test/b.png"])  # alone, a folder like others
    assert source.present()[1] == ["a.png", "test/b.png"]
    folder(root, ["train/c.png", "val/d.png"])
    assert source.present()[1] == ["a.png", "train/c.png"]
