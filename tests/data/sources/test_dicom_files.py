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
from dmjd.data.inspection import Inspection
from dmjd.data.sources.registry import open_source
from dmjd.data.statistics import range_warning
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
