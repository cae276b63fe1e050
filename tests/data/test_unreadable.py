"""Replacement and counting of unreadable images."""

import numpy as np
import pytest
import torch

import dmjd
from dmjd.data.order import Part
from dmjd.data.unreadable import UnreadableImages, read_or_replace, replace_unreadable
from dmjd.images.stored import UnreadableImage


def test_unreadable_images_are_counted_once():
    unreadable = UnreadableImages()
    assert unreadable.add([("a", "cut"), ("b", "cut")]) == [("a", "cut"), ("b", "cut")]
    assert unreadable.add([("a", "cut"), ("c", "cut")]) == [("c", "cut")]
    assert UnreadableImages(unreadable.reports).count == unreadable.count == 3
    unreadable.check(3, 5)
    unreadable.check(None, 5)
    with pytest.raises(ValueError, match=r"3 of 5 images can't be read, more than max_unreadable = 2:\n  a: cut"):
        unreadable.check(2, 5)
    unreadable.add((str(i), "cut") for i in range(8))
    with pytest.raises(ValueError, match=r"11 of 900 .*= 10"):
        unreadable.check(None, 900)
    unreadable.check(None, 1001)
    unreadable.add((str(i), "cut") for i in range(26))  # 29 in all
    unreadable.check(0.29, 100)  # 29, in floats a little less
    with pytest.raises(ValueError, match="max_unreadable = 28"):
        unreadable.check(0.28, 100)


def test_each_image_gives_one_warning():
    unreadable, warnings = UnreadableImages([("a", "cut")]), []
    unreadable.add_and_warn([("a", "cut"), ("b", "empty"), ("b", "empty")], warnings.append)
    assert warnings == ["unreadable, replaced by another image: b: empty"]
    assert unreadable.count == 2


@pytest.mark.parametrize("lengths", [(), (50,), (7, 13, 30)])
def test_both_replacement_functions_agree_and_stay_in_a_source(lengths):
    parts = tuple(Part(length, None) for length in lengths)
    readable = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.4
    all_keys = torch.arange(200) * 1_000_003
    indices = all_keys % 50

    def read(index):
        if not readable[index]:
            raise UnreadableImage(str(index), "made so")
        return np.array(index)

    one_by_one = [
        int(read_or_replace(read, i, k, 50, parts)[0]) for i, k in zip(indices.tolist(), all_keys.tolist(), strict=True)
    ]
    replaced = replace_unreadable(indices, all_keys, readable, parts)
    assert replaced.tolist() == one_by_one
    if len(lengths) > 1:
        ends = torch.tensor(lengths).cumsum(0)
        assert torch.equal(torch.bucketize(replaced, ends, right=True), torch.bucketize(indices, ends, right=True))
        assert len(set(one_by_one)) == int(readable.sum())


def test_the_former_name_is_an_error_with_the_new_name():
    with pytest.raises(AttributeError, match=r"BadPictures is now dmjd\.data\.UnreadableImages"):
        _ = dmjd.data.BadPictures
    assert all(callable(getattr(dmjd.data, name)) for name in dmjd.data.__all__)
