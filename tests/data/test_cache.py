"""Sets in memory."""

import numpy as np
from image_sets import MIXED, Arrays

from dmjd.data import cache
from dmjd.data.cache import evenly_spaced, load_to_memory, memory_needed


def test_images_are_in_order_and_unreadable_ones_are_reported():
    memory = load_to_memory(Arrays(50, unreadable=[7]))
    assert memory.images.shape == (50, 3, 12, 12)
    assert memory.images[:, 0, 0, 0].tolist() == [i if i != 7 else 0 for i in range(50)]
    assert memory.readable.tolist() == [i != 7 for i in range(50)]
    assert memory.unreadable == {7: ("image 7", "made so")}


def test_one_image_of_another_size_keeps_the_set_out_of_memory():
    source = Arrays(2000)
    source.shapes = [(12, 12)] * 1999 + [(12, 13)]
    assert load_to_memory(source) is None


def test_sets_that_do_not_qualify(monkeypatch):
    assert load_to_memory(Arrays(5, shapes=MIXED)) is None
    assert load_to_memory(Arrays(5), max_pixels=143) is None
    assert load_to_memory(Arrays(5), max_pixels=144).images.nbytes == memory_needed(Arrays(5), 144) == 5 * 432
    assert memory_needed(Arrays(5, shapes=MIXED)) is None
    assert memory_needed(Arrays(5), 143) is None
    monkeypatch.setattr(cache, "MAX_BYTES", 5 * 432 - 1)
    assert load_to_memory(Arrays(5)) is None


def test_evenly_spaced():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 9).tolist() == [0, 1, 2]
    assert evenly_spaced(100, 1).dtype == np.int64
