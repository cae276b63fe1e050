"""DICOM files in folders, lists and shards: recognized by content, frame by frame, and through a whole run."""

import json
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
from dicom_files import shipped, write_dicom
from image_sets import save
from pydicom.pixels import pixel_array
from support import TINY_FIELDS, assert_same_bits

import dmjd
from dmjd.cli.main import main
from dmjd.config import recipes
from dmjd.data.growth import GROWTH_FILE, Growth
from dmjd.data.inspection import Inspection
from dmjd.data.sources.registry import open_source
from dmjd.data.statistics import range_warning
from dmjd.images.stored import UnreadableImage
from dmjd.warning import DMJDWarning


def names(source):
    return [source.describe(i).removeprefix(f"{source.root}/") for i in range(len(source))]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A series without suffixes, a file of 30 frames, a photograph, and files that are no images."""
    root = tmp_path_factory.mktemp("dicom") / "set"
    rng = np.random.default_rng(0)
    for i in range(3):
        write_dicom(root / "series" / f"1.2.{i}", rng.integers(0, 4096, (40, 36), dtype=np.uint16), 12)
    write_dicom(root / "series" / "IM1", rng.integers(0, 256, (40, 36), dtype=np.uint8))
    shutil.copy(shipped("examples_ybr_color.dcm"), root / "us.dcm")
    save(root / "photo.png", size=(40, 36))
    shutil.copy(shipped("reportsi.dcm"), root / "report.dcm")
    (root / "README").write_text("no image")
    (root / "series" / "DICOMDIR").write_bytes(shipped("dicomdirtests/DICOMDIR").read_bytes())
    (root / "broken.dcm").write_bytes(b"no image")
    os.symlink("nowhere", root / "link")
    return root


def test_a_folder_is_searched_by_content(series):
    with pytest.warns(DMJDWarning, match=r"1 DICOM files without an image, .*report.dcm for one, are left out"):
        source = open_source(series)
    frames = [f"us.dcm#{i}" for i in range(1, 31)]
    assert names(source) == [
        "broken.dcm",
        "photo.png",
        "series/1.2.0",
        "series/1.2.1",
        "series/1.2.2",
        "series/IM1",
        *frames,
    ]
    assert np.array_equal(source.read(names(source).index("us.dcm#5")), pixel_array(series / "us.dcm", index=4))
    assert source.fingerprint() == open_source(series).fingerprint()
    assert len(source.content_sample()) == len(source)


def test_a_file_that_is_cut_off_is_not_passed_over(series, tmp_path):
    shutil.copytree(series, tmp_path / "set", symlinks=True)
    (tmp_path / "set" / "series" / "IM0").write_bytes((series / "series" / "IM1").read_bytes()[:300])
    with pytest.warns(DMJDWarning, match="1 DICOM files without an image"):
        source = open_source(tmp_path / "set")
    assert "series/IM0" in names(source)
    with pytest.raises(UnreadableImage, match="IM0: it is cut off before its image"):
        source.read(names(source).index("series/IM0"))


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 12, 12), dtype=np.uint8)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_a_file_that_is_replaced_does_not_join(before, after, tmp_path):
    """It, or a frame of it, may be held out."""
    values = {count: frames(count)[0] if count == 1 else frames(count) for count in (before, after)}
    write_dicom(tmp_path / "set" / "a.dcm", values[before])
    source = open_source(tmp_path / "set")
    write_dicom(tmp_path / "set" / "a.dcm", values[after])
    write_dicom(tmp_path / "set" / "b.dcm", frames(2))
    growth = Growth(source, [len(source)], 0, tmp_path / GROWTH_FILE)
    growth.orders[0].reach(0, len(source))
    joined = growth.among(np.arange(len(source) + 9)[: len(source) + growth.count])
    assert [path for _, path in joined.values()] == [f"{tmp_path}/set/b.dcm#{i}" for i in (1, 2)]


def test_rows_of_a_list_name_frames(tmp_path):
    write_dicom(tmp_path / "a.dcm", frames(3))
    file = tmp_path / "list.txt"
    file.write_text("a.dcm\n")
    source = open_source(file)
    file.write_text("a.dcm#1\na.dcm#3\n")  # its only image in other words, and a new one
    growth = Growth(source, [1], 0, tmp_path / GROWTH_FILE)
    growth.orders[0].reach(0, 1)
    assert growth.among(np.arange(1 + growth.count)) == {1: (0, f"{tmp_path}/a.dcm#3")}
    file.write_text("a.dcm\na.dcm#2\na.dcm#1\n")
    with pytest.raises(ValueError, match=r"line 3 of .*names the image of line 1 again: a\.dcm#1"):
        open_source(file)


def test_frames_are_not_equal_images(series):
    inspection = Inspection(open_source(series), 0)
    assert sum(inspection.look()) == 36
    found = inspection.summary()
    assert found["formats"] == {"DICOM": 34, "PNG": 1}
    assert found["channels"]["3 x uint8"] >= 30
    assert found["equal"]["count"] == 0
    assert [name for name, _ in found["unreadable"]["first"]] == [f"{series}/broken.dcm"]


def test_a_list_names_files_or_frames(series, tmp_path):
    (tmp_path / "list.txt").write_text("us.dcm#30\nus.dcm\nseries/1.2.1\n")
    source = open_source(tmp_path / "list.txt", root=series)
    for index, frame in ((0, 29), (1, 0)):
        assert np.array_equal(source.read(index), pixel_array(series / "us.dcm", index=frame))
    (tmp_path / "list.txt").write_text("us.dcm\nother.dcm#2\n")
    with pytest.raises(ValueError, match=r"1 of 2 files in .* do not exist: other.dcm#2"):
        open_source(tmp_path / "list.txt", root=series)


def test_members_of_shards_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(shipped("MR_small.dcm"), "one.dcm")
        shard.add(shipped("examples_ybr_color.dcm"), "two.dcm")
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 2
    assert np.array_equal(source.read(1), pixel_array(shipped("examples_ybr_color.dcm"), index=0))


def test_values_that_use_little_of_their_range_are_named_in_those_of_the_modality(tmp_path):
    values = np.random.default_rng(0).integers(900, 1300, (8, 8), dtype=np.uint16)
    write_dicom(tmp_path / "a.dcm", values, 16, RescaleSlope="1", RescaleIntercept="-1024")
    assert "pass --value-range -130 270" in range_warning(open_source(tmp_path))


def test_a_run_on_frames_is_resumed_and_evaluated(series, tmp_path, capsys):
    fields = TINY_FIELDS | {"batch_size": 8, "num_workers": 0, "steps": 5, "checkpoint_every": 2, "in_chans": 1}

    def stop(report):
        if report.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    configs = [recipes.folder(str(series), str(tmp_path / name), **fields) for name in ("whole", "stopped")]
    assert dmjd.pretrain(configs[0]).finished
    assert not dmjd.pretrain(configs[1], hooks=[stop]).finished
    assert dmjd.pretrain(configs[1].replace(num_workers=1)).finished
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    assert main(["embed", str(tmp_path / "whole"), "--out", str(tmp_path / "f.npy"), "--device", "cpu"]) == 0
    assert len(np.load(tmp_path / "f.npy")) == 35  # all but the broken one
    assert main(["inspect", str(series), "--json", str(tmp_path / "i.json"), "--out", str(tmp_path / "i.png")]) == 0
    assert json.loads((tmp_path / "i.json").read_text())["num_images"] == 36
