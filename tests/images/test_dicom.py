"""DICOM: values against pydicom's own transforms, frames, and files that go wrong."""

import contextlib
import shutil
import sys
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from dicom_files import SHIPPED, lut, shipped, write_dicom
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from dmjd.data.sources.registry import open_source
from dmjd.images.dicom import MISSING_EXTRA, count_frames, frame_of, may_be_dicom
from dmjd.images.invalid import InvalidPixels
from dmjd.images.reading import read_image
from dmjd.images.stored import UnreadableImage

GRAY = np.random.default_rng(0).integers(0, 4096, (9, 7), dtype=np.uint16)


def transformed(path, index=0):
    """By pydicom: the values of the modality, and those of the VOI transform."""
    data = pydicom.dcmread(path)
    modality = apply_modality_lut(pixel_array(path, index=index), data)
    return modality, apply_voi_lut(modality, data)


def scaled(values, lo, hi):
    return (255 * (np.clip(np.asarray(values, dtype=np.float64), lo, hi) - lo) / (hi - lo))[..., None]


def test_a_window_is_that_of_pydicom(tmp_path):
    """A CT: 12 bits in 16, slope and intercept, two windows of which the first counts."""
    window = {"WindowCenter": [40, 300], "WindowWidth": [400, 1500]}
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        path = write_dicom(
            tmp_path / function,
            GRAY,
            12,
            RescaleSlope="0.5",
            RescaleIntercept="-1024",
            VOILUTFunction=function,
            **window,
        )
        _, windowed = transformed(path)
        expected = scaled(windowed, -1024, 4095 * 0.5 - 1024)
        np.testing.assert_allclose(read_image(path, 1), expected, atol=2e-3)


def test_shipped_files_with_a_window_are_read_as_by_pydicom():
    for name in ("MR_small.dcm", "liver_1frame.dcm", "examples_overlay.dcm", "693_J2KI.dcm", "MR_small_RLE.dcm"):
        data = pydicom.dcmread(shipped(name), stop_before_pixels=True)
        modality, windowed = transformed(shipped(name))
        signed, bits = data.PixelRepresentation, data.BitsStored
        lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        shown = windowed if "WindowWidth" in data else modality
        expected = scaled(shown, lo * slope + intercept, hi * slope + intercept)
        np.testing.assert_allclose(read_image(shipped(name), 1), expected, atol=2e-3, err_msg=name)


def test_without_a_window_black_and_white_are_the_ends_of_the_bits(tmp_path):
    signed = (GRAY.astype(np.int16) - 2048) << 0
    for values, bits, ends in ((GRAY, 12, (0, 4095)), (signed, 12, (-2048, 2047)), (GRAY, None, (0, 65535))):
        path = write_dicom(tmp_path / "a", values, bits)
        np.testing.assert_allclose(read_image(path, 1), scaled(values, *ends), atol=1e-4)
    small = (GRAY >> 4).astype(np.uint8)
    plain = read_image(write_dicom(tmp_path / "b", small), 1)
    assert plain.dtype == np.uint8
    assert np.array_equal(plain[..., 0], small)


def test_a_given_range_is_one_of_the_modality(tmp_path):
    """Hounsfield units, instead of the window in the file."""
    window = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "WindowCenter": 40, "WindowWidth": 80}
    path = write_dicom(tmp_path / "a", GRAY, 12, **window)
    expected = scaled(GRAY.astype(float) - 1024, -150, 250)
    np.testing.assert_allclose(read_image(path, 1, (-150, 250)), expected, atol=1e-3)
    inverted = write_dicom(tmp_path / "b", GRAY, 12, PhotometricInterpretation="MONOCHROME1", **window)
    np.testing.assert_allclose(read_image(inverted, 1, (-150, 250)), 255 - expected, atol=1e-3)


def test_low_values_of_monochrome1_are_white(tmp_path):
    for values, bits in ((GRAY, 12), ((GRAY >> 4).astype(np.uint8), None)):
        plain = read_image(write_dicom(tmp_path / "a", values, bits), 1)
        inverted = read_image(write_dicom(tmp_path / "b", values, bits, PhotometricInterpretation="MONOCHROME1"), 1)
        np.testing.assert_allclose(inverted, 255.0 - plain, atol=1e-3)


def test_lookup_tables_are_applied(tmp_path):
    values = (GRAY >> 8).astype(np.uint16)  # 0 to 15
    modality = lut([100 * i for i in range(16)], 0, 16)
    voi = lut([min(255, i // 4) for i in range(1600)], 0, 8)
    path = write_dicom(tmp_path / "a", values, 4, ModalityLUTSequence=[modality], VOILUTSequence=[voi])
    _, shown = transformed(path)
    np.testing.assert_allclose(read_image(path, 1), scaled(shown, 0, 255), atol=1e-3)
    np.testing.assert_allclose(read_image(path, 1, (0, 1500)), scaled(values * 100.0, 0, 1500), atol=1e-3)


def test_colors_are_those_of_pydicom():
    for name in ("examples_rgb_color.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle.dcm", "examples_jpeg2k.dcm"):
        image = read_image(shipped(name), 3)
        assert image.dtype == np.uint8
        assert np.array_equal(image, pixel_array(shipped(name)))
    palette = pydicom.pixels.apply_color_lut(
        pixel_array(shipped("examples_palette.dcm")), pydicom.dcmread(shipped("examples_palette.dcm"))
    )
    np.testing.assert_allclose(read_image(shipped("examples_palette.dcm"), 3), palette / 257.0, atol=1e-3)


def test_each_frame_is_an_image(tmp_path):
    path = shipped("examples_ybr_color.dcm")
    assert count_frames(str(path)) == 30
    for frame in (1, 17, 30):
        assert np.array_equal(read_image(f"{path}#{frame}", 3), pixel_array(path, index=frame - 1))
    with pytest.raises(UnreadableImage, match=r"dcm#31: it has 30 frame\(s\)"):
        read_image(f"{path}#31", 3)
    dose = shipped("rtdose_rle.dcm")
    assert count_frames(str(dose)) == 15
    values = pixel_array(dose, index=14)
    np.testing.assert_allclose(read_image(f"{dose}#15", 1, (0, 1e6)), scaled(values, 0, 1e6), atol=1e-3)
    shutil.copy(path, tmp_path / "odd#2")  # a name that looks like a frame
    assert frame_of(tmp_path / "odd#2") == (f"{tmp_path}/odd#2", 1)


def test_frames_of_enhanced_images_have_transforms_of_their_own(tmp_path):
    frames = np.stack([GRAY, GRAY, GRAY])

    def group(**elements):
        sequence, item = Dataset(), Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
        name = "FrameVOILUTSequence" if "WindowCenter" in elements else "PixelValueTransformationSequence"
        setattr(sequence, name, [item])
        return sequence

    windows = [group(WindowCenter=center, WindowWidth=200) for center in (0, 500, 1000)]
    shared = [group(RescaleSlope="1", RescaleIntercept="-1000")]
    path = write_dicom(
        tmp_path / "a", frames, 12, SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=windows
    )
    assert count_frames(str(path)) == 3
    for number, center in enumerate((0, 500, 1000), start=1):
        expected = scaled(GRAY.astype(float) - 1000, center - 100, center + 99)
        np.testing.assert_allclose(read_image(f"{path}#{number}", 1), expected, atol=1e-3)


def test_what_cannot_be_read_has_a_reason(recwarn):
    reasons = {
        "MR_small_jpeg_ls_lossless.dcm": r"its compression \(JPEG-LS Lossless.*\) needs a plugin: pip install",
        "SC_rgb_jpeg_gdcm.dcm": "needs a plugin: pip install",
        "MR_truncated.dcm": "damaged or unsupported",
        "reportsi.dcm": "a DICOM file without an image",
        "image_dfl.dcm": "deflated",
        "badVR.dcm": "damaged or unsupported",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImage, match=reason):
            read_image(shipped(name))
    assert not list(recwarn)


@given(data=st.data())
def test_damaged_files_are_unreadable_and_nothing_else(data, tmp_path_factory):
    content = bytearray(
        shipped(data.draw(st.sampled_from(["MR_small.dcm", "SC_rgb_rle_2frame.dcm", "rtdose.dcm"]))).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(132, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(140, len(content)))])
    path = tmp_path_factory.mktemp("damaged") / "a.dcm"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= count_frames(str(path)) <= len(content)
        with contextlib.suppress(UnreadableImage):
            assert read_image(content, 3).ndim == 3


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = write_dicom(tmp_path / "a", GRAY, 12, Rows=65535, Columns=65535)
    with pytest.raises(UnreadableImage, match="65535 x 65535 pixels, more than"):
        read_image(path)
    many = write_dicom(tmp_path / "b", GRAY, 12, NumberOfFrames=2**30)
    assert count_frames(str(many)) <= many.stat().st_size // GRAY.nbytes + 1  # one may be cut off
    with pytest.raises(UnreadableImage, match=r"b#9: "):
        read_image(f"{many}#9")


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    content = shipped("image_dfl.dcm").read_bytes()
    start = 128 + 4 + 12 + pydicom.dcmread(shipped("image_dfl.dcm")).file_meta.FileMetaInformationGroupLength
    inflated = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    (tmp_path / "a.dcm").write_bytes(content[:start] + pack.compress(inflated + bytes(1 << 24)) + pack.flush())
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was inflated"))
    assert count_frames(str(tmp_path / "a.dcm")) == 1
    with pytest.raises(UnreadableImage, match="deflated"):
        read_image(tmp_path / "a.dcm")


def test_padding_is_invalid_where_invalid_pixels_are(tmp_path):
    """In stored values; also a range of them, signed ones written as unsigned, and where black is white."""
    values = GRAY.astype(np.int16) - 1000
    values[2:4], values[4:6] = -2000, -1990
    window = {"RescaleIntercept": "-24", "RescaleSlope": 1}
    limit = DataElement(0x00280121, "SS", -1980)
    for vr, padding in (("SS", -2000), ("US", 63536)):
        for shown in ("MONOCHROME1", "MONOCHROME2"):
            path = write_dicom(tmp_path / "a", values, PhotometricInterpretation=shown, **window)
            data = pydicom.dcmread(path)
            data.add(DataElement(0x00280120, vr, padding))
            data.save_as(path)
            assert np.isfinite(read_image(path, 1)).all()
            found = np.isnan(read_image(path, 1, invalid=InvalidPixels()))[..., 0]
            assert np.array_equal(found, values == -2000)
            data.add(limit)
            data.save_as(path)
            found = np.isnan(read_image(path, 1, invalid=InvalidPixels()))[..., 0]
            assert np.array_equal(found, values < -1980)


def test_a_value_without_meaning_is_one_of_the_modality(tmp_path):
    """Whatever is shown for it: an inverted value, or one of a table."""
    values = GRAY.copy()
    values[3] = 7
    table = {"VOILUTSequence": [lut(list(range(4096))[::-1], 1000, 12)]}
    for settings in ({"PhotometricInterpretation": "MONOCHROME1"}, table):
        path = write_dicom(tmp_path / "a", values, 12, RescaleIntercept="1000", RescaleSlope="1", **settings)
        found = np.isnan(read_image(path, 1, invalid=InvalidPixels(nodata=1007.0)))
        assert np.array_equal(found[..., 0], values == 7)
    assert not np.isnan(read_image(shipped("CT_small.dcm"), 1, invalid=InvalidPixels())).any()
    assert not np.isnan(read_image(shipped("examples_palette.dcm"), 3, invalid=InvalidPixels())).any()


def test_other_files_have_no_frames(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="no DICOM file, and has no frame 7"):
        read_image(tmp_path / "a.png#7")


@pytest.mark.parametrize("name", ["CT_small.dcm", "examples_ybr_color.dcm", "private"])
def test_a_file_that_is_cut_off_before_its_image_is_an_unreadable_image(name, tmp_path):
    if name == "private":
        data = pydicom.dcmread(write_dicom(tmp_path / name, np.zeros((4, 4), np.uint8)))
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.3.4"
        data.add_new(0x00091010, "OB", b"x" * 900)  # before Rows, and skipped
        data.save_as(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        ends = [whole.find(b"x" * 900) + 100, 132]
    else:
        whole = shipped(name).read_bytes()
        rows = whole.find(b"\x28\x00\x10\x00")
        ends = [*range(132, rows, rows // 20), rows]
    for end in ends:
        (tmp_path / "IM1").write_bytes(whole[:end])
        assert count_frames(str(tmp_path / "IM1")) == 1, end
        with pytest.raises(UnreadableImage, match=r"cut off before its image|damaged"):
            read_image(tmp_path / "IM1", 1)


def test_reports_hold_no_image_even_if_cut(tmp_path):
    for name in ("reportsi.dcm", "test-SR.dcm", "rtplan.dcm", "rtplan_truncated.dcm", "waveform_ecg.dcm"):
        assert count_frames(str(shipped(name))) == 0, name


@pytest.mark.parametrize(
    ("names", "may"),
    [(["a.dcm", "IM0001", "1.2.840.113619.2", "a.IMA"], True), (["a.txt", "DICOMDIR", "notes.md"], False)],
)
def test_names_of_dicom_files(names, may):
    assert {may_be_dicom(name) for name in names} == {may}


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydicom"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    shutil.copy(shipped("MR_small.dcm"), tmp_path / "IM1")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.txt").write_text(f"{shipped('MR_small.dcm')}\n")
    paths = (shipped("MR_small.dcm"), tmp_path, tmp_path / "lists" / "a.txt")
    said = []
    for call, path in zip((read_image, open_source, open_source), paths, strict=True):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (compared below)
            call(path)
        said.append(str(raised.value))
    one, folder, listed = said
    assert one == f"{shipped('MR_small.dcm')}: {MISSING_EXTRA}"
    assert folder == f"{tmp_path} holds 1 DICOM files, IM1 for one. {MISSING_EXTRA}"
    assert listed == f"{tmp_path}/lists/a.txt names DICOM files. {MISSING_EXTRA}"
    assert SHIPPED.is_dir()
