"""Tar and zip files of images as a set: parts, order, resuming, changes."""

import os
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from archives import overwrite, tar, zipped
from image_sets import first_values, png, save
from support import TINY, final

from dmjd.cli.main import main
from dmjd.data.recheck import Began, check_moved, recheck
from dmjd.data.sources.registry import absolute, align_labels, has_split, open_source
from dmjd.data.sources.shards import INDEX_ENDING, ShardSource
from dmjd.data.sources.transfer import ChangedFile
from dmjd.data.train_loader import TrainLoader
from dmjd.data.unreadable import MISSING
from dmjd.images.stored import UnreadableImage


def test_all_images_in_order_with_names_and_labels(shards):
    source = open_source(shards, labels="column")
    assert isinstance(source, ShardSource)
    assert first_values(source) == list(range(12))
    assert source.describe(5) == f"{shards}/b.zip/5.png"
    assert (source.labels.tolist(), source.classes) == ([0, 1] * 6, ["0", "1"])
    assert len(open_source(str(shards / "*.zip"))) == 8
    assert first_values(open_source(shards / "c.zip")) == [8, 9, 10, 11]
    assert absolute(os.path.relpath(shards / "*.zip")) == str(shards / "*.zip")


def test_parts_by_folder_or_name(shards, tmp_path):
    for part, letter in (("train", "a"), ("Val", "b")):
        (tmp_path / "parts" / part).mkdir(parents=True)
        shutil.copy(next(shards.glob(f"{letter}.*")), tmp_path / "parts" / part)
    assert [len(open_source(tmp_path / "parts", split=split)) for split in ("train", "test")] == [4, 4]
    shutil.copy(shards / "a.tar", shards / "val-0.tar")
    assert not has_split(shards, "test")
    (shards / "a.tar").rename(shards / "train-0.tar")
    train, test = (open_source(shards, split=split, labels="column") for split in ("train", "test"))
    assert (train.describe(0), len(train)) == (f"{shards}/train-0.tar/0.png", 4)
    assert align_labels(train, test).tolist() == [0, 1, 0, 1]
    assert has_split(str(shards / "*.tar"), "test")
    assert not has_split(str(shards / "train-*.tar"), "test")
    assert not has_split(shards / "train-0.tar", "test")


def test_a_folder_of_images_stays_one_if_an_archive_lies_beside_them(shards):
    save(shards / "images" / "cat.png")
    assert first_values(open_source(shards)) == [0]
    (shards / "images").rename(shards / "hidden")
    os.symlink(shards / "hidden", shards / "images")
    shutil.rmtree(shards / "hidden")
    assert len(open_source(shards)) == 12


def test_a_misspelled_shard_is_not_a_name_of_the_hub(shards):
    with pytest.raises(ValueError, match=r"did you mean .*a\.tar"):
        open_source(str(shards / "aa.tar"))
    with pytest.raises(ValueError, match=r"there is no .*x-\*\.tar"):
        open_source(str(shards / "x-*.tar"))


def test_few_files_are_open(tmp_path):
    for i in range(100):
        tar(tmp_path / f"{i:03d}.tar", {"0.png": png(i)})
    source, before = open_source(tmp_path), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert first_values(source) == list(range(100))
    assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_batches_do_not_depend_on_workers_or_start(shards):
    save(shards.parent / "large.png", 77, (40, 30))
    tar(shards / "d.tar", {"x.png": (shards.parent / "large.png").read_bytes()})  # not in memory: of several sizes
    source = open_source(shards)
    made = {}
    for workers, start in ((0, 0), (2, 0), (2, 2)):
        loader = TrainLoader(source, img_size=(8, 8), batch_size=6, num_workers=workers)
        assert not loader.in_memory
        batches = loader.batches(start)
        made[workers, start] = [next(batches) for _ in range(4 - start)]
        batches.close()
    for name in ("images", "keys"):
        straight, *others = ([getattr(b, name) for b in made[key]] for key in ((0, 0), (2, 0)))
        assert all(a.equal(b) for a, b in zip(straight, others[0], strict=True))
        assert all(a.equal(getattr(b, name)) for a, b in zip(straight[2:], made[2, 2], strict=True))


def test_a_run_keeps_its_index_and_goes_on_after_shards_were_changed_or_removed(shards, tmp_path):
    listing, warnings = tmp_path / "files.txt", []
    source = open_source(shards)
    source.save_listing(listing)
    began = Began.of(source)
    os.utime(shards / "a.tar", ns=(1, 1))
    assert recheck(open_source(shards, listing=listing), began, [], warnings.append).reports == []
    assert warnings == []
    tar(shards / "a.tar", {f"{i}.png": png(i) if i else b"longer than it was" * 20 for i in (3, 2, 0)})  # 1 is gone
    tar(shards / "new.tar", {"new.png": png(0)})
    changed = open_source(shards, listing=listing)
    assert [int(changed.read(i)[0, 0, 0]) for i in range(2, 12)] == list(range(2, 12))  # the order stays
    with pytest.raises(UnreadableImage, match=rf"a\.tar/1\.png: {MISSING}"):
        changed.read(1)
    recheck(changed, began, [], warnings.append)
    assert "at least 2 image(s) have changed since the run began" in warnings[0]
    assert "a.tar/0.png for one" in warnings[0]
    (shards / "b.zip").unlink()
    removed = open_source(shards, listing=listing)
    reports = [(removed.describe(i), "damaged") for i in (0, 1, 4, 5, 6, 7)]
    record = recheck(removed, began, reports, print)
    record.check(1, 12)  # those that were removed do not count
    with pytest.raises(ValueError, match="are not those this run began with"):
        recheck(open_source(shards), began, [], print)
    listing.with_suffix(".arrow").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"files\.arrow is not an index of shards: delete it"):
        open_source(shards, listing=listing)


def test_a_set_at_another_path_is_the_same_only_if_its_content_is(shards, tmp_path):
    began = Began.of(open_source(shards))
    check_moved(open_source(shutil.copytree(shards, tmp_path / "new")), began, [], "old")
    overwrite(tmp_path / "new" / "a.tar", 512 + 50, b"other")
    with pytest.raises(ValueError, match="1 differ from those this run began"):
        check_moved(open_source(tmp_path / "new"), began, [], "old")


def test_a_shard_that_vanishes_under_a_run_is_counted(shards):
    source = open_source(shards)
    (shards / "a.tar").unlink()
    with pytest.raises(UnreadableImage, match=MISSING):
        source.read(0)
    loader = TrainLoader(source, img_size=(8, 8), batch_size=12, num_workers=0)
    reports = dict(loader.unreadable + next(loader.batches()).unreadable)
    assert {source.describe(i) for i in range(4)} == set(reports)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_shard_that_changes_under_a_run_ends_it(shards, is_open):
    source = open_source(shards)
    if is_open:
        source.read(4)
    overwrite(shards / "b.zip", 3, b"\0")
    with pytest.raises(
        ChangedFile, match=r"b\.zip has changed while it was read; the same command takes it as it is now"
    ):
        source.read(5)


def test_the_checksum_of_zip_members_is_checked(tmp_path):
    """Of a member whose content and checksum differ, though it can be decoded."""
    image = png(7) + bytes(99)
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        file = zipped(tmp_path / f"{name}.zip", {"a.png": image, "b.png": image}, method)
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(file) as opened:
            crc = opened.getinfo("a.png").CRC.to_bytes(4, "little")
        at = content.index(crc, content.index(b"PK\1\2"))
        content[at] ^= 1
        file.write_bytes(content)
        source = open_source(file)
        with pytest.raises(UnreadableImage, match="its content does not match the CRC-32 that the shard says"):
            source.read(0)
        assert source.read(1)[0, 0, 0] == 7


def test_an_index_without_checksums_is_read(shards, tmp_path):
    """As runs have it that began before checksums were checked."""
    source, listing = open_source(shards), tmp_path / "files.txt"
    source.save_listing(listing)
    file = listing.with_suffix(INDEX_ENDING)
    with pa.memory_map(str(file)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
        former = table.drop_columns("crc")
        with pa.ipc.new_file(tmp_path / "former.arrow", former.schema) as writer:
            for batch in former.to_batches():
                writer.write_batch(batch)
    os.replace(tmp_path / "former.arrow", file)
    again = open_source(shards, listing=listing)
    assert again.fingerprint() == source.fingerprint()
    assert first_values(again) == first_values(source)


def test_a_resumed_run_is_an_uninterrupted_one(shards, tmp_path, capsys):
    command = ["pretrain", "--data", str(shards), *TINY, "--batch-size", "4", "--out"]
    assert main([*command, str(tmp_path / "straight"), "--steps", "4"]) == 0
    assert main([*command, str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2"]) == 0
    assert (tmp_path / "run" / "files.arrow").exists()
    (tmp_path / "run" / "checkpoints" / "final.safetensors").unlink()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "dmjd" / "shards")
    tar(shards / "more.tar", {"more.png": png(200)})
    assert main([*command, str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2"]) == 0
    straight, resumed = final(tmp_path / "straight"), final(tmp_path / "run")
    assert all(resumed[name].equal(value) for name, value in straight.items())


def test_shards_in_folders_below_are_hinted_at(shards):
    (shards / "deep").mkdir()
    for file in list(shards.glob("*.*")):
        file.rename(shards / "deep" / file.name)
    with pytest.raises(ValueError, match=r"the shards below are given by a pattern, '.*/shards/\*\*/\*\.tar'"):
        open_source(str(shards))
