"""Mean, standard deviation and typical size of a set."""

import numpy as np
import pytest
from image_sets import save

from dmjd.data.sources.folder import FolderSource
from dmjd.data.sources.registry import open_source
from dmjd.data.statistics import measure_stats, typical_size


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
    assert "value_range" in warning
    ranged = measure_stats(open_source(tmp_path, in_chans=6, value_range=(0, 4000)))
    assert ranged.warning is None
    np.testing.assert_allclose(ranged.mean, [0.5] * 6, atol=1e-4)


def test_typical_size_is_the_median(tmp_path):
    for i, size in enumerate([(10, 20), (30, 40), (12, 22), (11, 99), (13, 1)]):
        save(tmp_path / f"{i}.png", size=size)
    assert typical_size(open_source(tmp_path)) == (22, 12)


def test_nothing_readable(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images .* the file is empty"):
        measure_stats(FolderSource(tmp_path))
    assert typical_size(FolderSource(tmp_path)) is None
