"""Mean, standard deviation and typical size of a set."""

import re

import numpy as np
import pytest
from image_sets import save

from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.registry import open_source
from dmjd.data.statistics import measure_stats, range_warning, typical_size, warn_of_range
from dmjd.warning import DMJDWarning


def test_mean_and_deviation_are_those_of_all_pixels(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image)
    mean, std, warning = measure_stats(open_source(tmp_path))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), atol=1e-4)
    assert warning is None


def test_a_small_range_gives_a_warning(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((4, 5, 6), 1000 * (i + 1), np.uint16))
    mean, std, warning = measure_stats(open_source(tmp_path, in_chans=6))
    assert len(mean) == len(std) == 6
    assert min(std) > 0
    assert "--value-range 0 4095" in warning
    ranged = measure_stats(open_source(tmp_path, in_chans=6, value_range=(0, 4000)))
    assert ranged.warning is None
    np.testing.assert_allclose(ranged.mean, [0.5] * 6, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "dtype", "value_range", "text"),
    [
        ((0, 4087), np.uint16, None, "between 0 and 4087, 6.2% of the range from 0 to 65535.* --value-range 0 4095,"),
        ((300, 900), np.uint16, None, "--value-range 0 1023,"),
        ((30_000, 34_000), np.uint16, None, "--value-range 30000 34000,"),
        ((0, 15), np.uint8, None, "--value-range 0 15,"),
        ((0, 0.043), np.float32, None, "from 0 to 1: .*--value-range 0 0.043,"),
        ((100, 180), np.int16, (-1000, 1000), "--value-range 100 180,"),
        ((0, 65_535), np.uint16, None, None),
        ((0, 255), np.uint8, None, None),
        ((7, 7), np.uint16, None, None),
        ((0, 4087), np.uint16, (0, 4095), None),
    ],
)
def test_values_that_fill_little_of_their_range(tmp_path, values, dtype, value_range, text):
    for i in range(40):
        np.save(tmp_path / f"{i}.npy", np.array(values * 6, dtype).reshape(3, 4)[..., None].repeat(3, -1))
    warning = range_warning(open_source(tmp_path, value_range=value_range))
    assert (warning is None) == (text is None)
    assert text is None or re.search(text, warning)


def test_images_for_a_trained_encoder(tmp_path):
    for value in (0, 3):
        save(tmp_path / f"{value}.png", value)
    with pytest.warns(
        DMJDWarning, match=r"0 and 3, 1\.2% of .* from 0 to 255, which the encoder takes: .* scale these"
    ):
        warn_of_range(open_source(tmp_path, value_range=(0, 255)))


def test_typical_size_is_the_median(tmp_path):
    for i, size in enumerate([(10, 20), (30, 40), (12, 22), (11, 99), (13, 1)]):
        save(tmp_path / f"{i}.png", size=size)
    assert typical_size(open_source(tmp_path)) == (22, 12)


def test_nothing_readable(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images .* the file is empty"):
        measure_stats(FolderSource(tmp_path))
    assert typical_size(FolderSource(tmp_path)) is None
