"""A run goes on after unreadable images were repaired or removed, with the list of images it began with."""

import json
import shutil

import pytest
from image_sets import Arrays, first_values, save, write_table
from support import TINY, metrics

from dmjd.cli.main import main
from dmjd.data.recheck import Began, check_moved, moved_reports, recheck
from dmjd.data.sources.registry import open_source
from dmjd.data.unreadable import MISSING, UnreadableImages


@pytest.fixture
def begun(tmp_path):
    """A folder of 24 images of which 13 are damaged, its list, and what a run that began with it recorded."""
    root, listing = tmp_path / "set", tmp_path / "files.txt"
    for i in range(24):
        save(root / f"{i:02d}.png", i)
        if i >= 11:
            (root / f"{i:02d}.png").write_bytes(b"damaged")
    source = open_source(root)
    source.save_listing(listing)
    reports = [(source.describe(i), "not an image in a known format") for i in range(11, 23)]  # the last was not met
    return root, listing, Began.of(source), reports


def test_repaired_and_removed_images_do_not_count(begun):
    root, listing, began_with, reports = begun
    warnings = []
    unchanged = recheck(open_source(root, listing=listing), began_with, reports, warnings.append)
    assert (unchanged.reports, warnings) == (reports, [])
    with pytest.raises(ValueError, match="12 of 24 images can't be read"):
        unchanged.check(None, 24, unchanged.cure(True))
    for i in range(11, 15):
        save(root / f"{i:02d}.png", i)
    for i in range(15, 23):
        (root / f"{i:02d}.png").unlink()
    source = open_source(root, listing=listing)
    assert len(source) == 24  # the order stays
    now = recheck(source, began_with, reports, warnings.append)
    assert now.reports == reports[4:]
    now.add([(source.describe(i), MISSING) for i in range(15, 23)])
    now.check(0, 24)  # none counts
    assert warnings == []
    save(root / "23.png", 23)  # repaired before the run met it
    recheck(open_source(root, listing=listing), began_with, reports, warnings.append)
    assert len(warnings) == 1
    assert "at least 1 image(s) have changed since the run began" in warnings[0]
    assert "23.png" in warnings[0]


def test_another_set_is_refused(begun):
    root, listing, began_with, reports = begun
    for i in range(24):
        save(root / f"{i:02d}.png", i, (40, 50))
    with pytest.raises(ValueError, match="are not those this run began with"):
        recheck(open_source(root, listing=listing), began_with, [], print)
    recheck(open_source(root, listing=listing), began_with, reports, print)  # half of them were known as damaged
    with pytest.raises(ValueError, match="are not those this run began with"):
        recheck(open_source(root), began_with, reports, print)  # without the list the sizes are not known
    content = json.loads(listing.read_text())
    listing.write_text(json.dumps(content | {"paths": content["paths"][1:]}))
    with pytest.raises(ValueError, match="are not those this run began with"):
        recheck(open_source(root, listing=listing), began_with, reports, print)


def test_the_cure_is_one_that_works(begun):
    root, listing, began_with, reports = begun
    record = recheck(open_source(root, listing=listing), began_with, reports, print)
    assert record.cure(False).startswith("Repair them, or raise")
    assert record.cure(True) == "Repair or remove them, or raise --max-unreadable; the same command goes on."
    shutil.rmtree(root)
    record.add([(f"{i}.png", MISSING) for i in range(30)])
    assert record.cure(True).startswith("Repair or remove them")
    assert UnreadableImages([("a.png", MISSING)]).cure(True).startswith("Put them back, or raise --max-unreadable")


@pytest.mark.parametrize(("way", "every"), [("repair", 2), ("remove", 2), ("remove", 100)])
def test_the_same_command_goes_on(tmp_path, capsys, way, every):
    """With a checkpoint and without one."""
    root = tmp_path / "set"
    for i in range(40):
        save(root / f"{i:02d}.png", i, (9 + i % 3, 9))
    damaged = [root / f"{i:02d}.png" for i in range(0, 40, 3)]
    command = ["pretrain", "folder", "--data", root, "--out", tmp_path / "run", *TINY, "--num-workers", 0]
    command += ["--batch-size", 8, "--steps", 12, "--checkpoint-every", every]
    for file in damaged:
        file.write_bytes(b"damaged")
    assert main(list(map(str, command))) == 2
    assert "images can't be read, more than max_unreadable = 10" in capsys.readouterr().err
    for file in damaged:
        save(file, 1, (9, 9)) if way == "repair" else file.unlink()
    assert main(list(map(str, command))) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 12
    assert "are not those" not in capsys.readouterr().err
    assert len(first_values(open_source(root))) == (40 if way == "repair" else 40 - len(damaged))


@pytest.fixture
def bmps(tmp_path):
    """24 images whose files all have the same number of bytes, with their list."""
    for i in range(24):
        save(tmp_path / "set" / f"{i:02d}.bmp", i)
    open_source(tmp_path / "set").save_listing(tmp_path / "files.txt")
    return tmp_path / "set"


def reopened(root):
    return open_source(root, listing=root.parent / "files.txt")


def test_content_that_changed_in_place(bmps):
    began, warnings = Began.of(reopened(bmps)), []
    for i in range(12):
        save(bmps / f"{i:02d}.bmp", 100 + i)
    recheck(reopened(bmps), began, [], warnings.append)
    assert warnings == [
        f"at least 12 image(s) have changed since the run began, {bmps}/00.bmp for one: "
        "it goes on with the images as they are now"
    ]
    save(bmps / "12.bmp", 112)
    with pytest.raises(ValueError, match=r"of 24 compared, 13 have changed, .*00.bmp for one; put them back, or give"):
        recheck(reopened(bmps), began, [], warnings.append)
    recheck(reopened(bmps), Began(began.fingerprint), [], warnings.append)  # a former version recorded no content
    assert len(warnings) == 1


def test_repairs_and_removals_of_the_same_size_do_not_count(bmps):
    files = [bmps / f"{i:02d}.bmp" for i in range(20)]
    for file in files:
        file.write_bytes(b"#" * file.stat().st_size)
    source, warnings = reopened(bmps), []
    began = Began.of(source)
    reports = [(source.describe(i), "not an image in a known format") for i in range(20)]
    for i, file in enumerate(files):
        save(file, i) if i % 2 else file.unlink()
    assert len(recheck(reopened(bmps), began, reports, warnings.append).reports) == 10
    assert warnings == []


def test_a_damaged_list_is_named_and_may_be_deleted(bmps):
    began, listing = Began.of(reopened(bmps)), bmps.parent / "files.txt"
    listing.write_text(listing.read_text().replace("03.bmp", "03.bmx"))
    with pytest.raises(ValueError, match=f"give another --out. If they are, {listing} is damaged: delete it."):
        recheck(reopened(bmps), began, [], pytest.fail)
    listing.unlink()
    recheck(reopened(bmps), began, [], pytest.fail)


def test_a_moved_set_is_compared_and_its_unreadable_images_are_renamed(begun, tmp_path):
    root, listing, began, reports = begun
    root.rename(other := tmp_path / "moved")
    source = open_source(other, listing=listing)
    renamed = moved_reports([*reports, ("row 3 of a.parquet", "damaged")], str(root), str(other))
    assert [name for name, _ in renamed] == [*(f"{other}/{i:02d}.png" for i in range(11, 23)), "row 3 of a.parquet"]
    check_moved(source, began, renamed, str(root))
    assert recheck(source, began, renamed[:-1], pytest.fail).count == 12
    save(other / "12.png", 12)  # repaired on the way
    check_moved(source, began, renamed, str(root))
    save(other / "01.png", 99)
    with pytest.raises(ValueError, match=r"1 differ from those this run began with, .*/moved/01\.png for one; .* give"):
        check_moved(source, began, renamed, str(root))
    with pytest.raises(ValueError, match=f"resume it once with --data {root}, or"):
        check_moved(source, Began(began.fingerprint), renamed, str(root))
    with pytest.raises(ValueError, match="are not those this run began with; a run may go on with the same images"):
        check_moved(open_source("digits"), began, renamed, str(root))


def test_labels_may_change_but_not_the_images_of_a_table(tmp_path):
    file = tmp_path / "a.parquet"
    write_table(file, range(8), label=[0, 1] * 4)
    began = Began.of(open_source(file, labels="column"))
    write_table(file, range(8), label=[2, 3] * 4)
    recheck(open_source(file, labels="column"), began, [], pytest.fail)
    write_table(file, range(8, 16), label=[0, 1] * 4)
    with pytest.raises(ValueError, match=r"of 8 compared, 8 have changed, row 0 of a\.parquet for one"):
        recheck(open_source(file, labels="column"), began, [], pytest.fail)


def test_a_large_set_is_sampled():
    class Counted(Arrays):
        reads = 0

        def stored(self, index):
            self.reads += 1
            return super().stored(index)

    source = Counted(10**9)
    recheck(source, Began.of(source), [], pytest.fail)
    assert source.reads <= 128


def test_a_run_on_images_that_changed_in_place(bmps, tmp_path, capsys):
    command = ["pretrain", "folder", "--data", bmps, "--out", tmp_path / "run", *TINY, "--num-workers", 0]
    command += ["--batch-size", 8, "--steps"]
    assert main(list(map(str, [*command, 2]))) == 0
    save(bmps / "05.bmp", 200)
    capsys.readouterr()
    assert main(list(map(str, [*command, 3]))) == 0
    assert "at least 1 image(s) have changed since the run began" in capsys.readouterr().err
    for i in range(24):
        save(bmps / f"{i:02d}.bmp", 100 + i)
    before = (tmp_path / "run" / "checkpoints" / "final.safetensors").read_bytes()
    assert main(list(map(str, [*command, 4]))) == 2
    assert "error: the images in" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "final.safetensors").read_bytes() == before
