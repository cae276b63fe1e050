"""Facts of a set: what is kept of each image, whatever their number."""

import tracemalloc

import numpy as np

from dmjd.data.inspection import ImageFacts, Inspection, facts_of
from dmjd.data.sources.registry import open_source


def test_memory_is_a_few_bytes_an_image():
    source, count = open_source("digits"), 2000
    facts_of(source, 0)  # what is made once
    tracemalloc.start()
    try:
        inspection = Inspection(source, count)
        assert sum(inspection.look()) == count
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 60 * count + 150_000
    assert inspection.summary()["looked_at"] == count


def test_what_is_kept_is_what_was_found():
    inspection = Inspection(open_source("digits"), 8)
    digests = [7, 5, 7, 1 << 63, 5, 5]
    for row, digest in enumerate(digests):
        facts = ImageFacts("ab"[row % 2], 3_000_000_000 + row, 30 + row, 40, "3 x uint8", digest, 0.5 * (row == 2))
        inspection.keep(row, facts)
    inspection.keep(6, ("six", "7 channels, in_chans is 3"))
    inspection.keep(7, ("seven", "9 channels, in_chans is 3"))
    found, name = inspection.summary(), inspection.source.describe
    assert inspection.readable.tolist() == inspection.indices[:6].tolist()
    assert found["formats"] == {"a": 3, "b": 3}
    assert found["bytes"] == {"median": 3_000_000_002, "largest": 3_000_000_005, "mean": 3_000_000_002.5}
    assert found["sizes"] == {"smallest": [30, 40], "median": [32, 40], "largest": [35, 40], "different": 6}
    pairs = [(0, 2), (1, 4), (1, 5)]
    named = [[name(int(inspection.indices[row])) for row in pair] for pair in pairs]
    assert found["equal"] == {"count": 3, "first": named}
    assert found["invalid"] == {"images": 1, "share": 0.5 / 6}
    assert found["unreadable"]["count"] == 2
    assert found["unreadable"]["reasons"] == {"... channels, in_chans is 3": 2}
    assert found["unreadable"]["first"][0] == ["six", "7 channels, in_chans is 3"]
    assert np.array_equal(inspection.sides[:, 0], np.arange(30, 36))


def test_reasons_without_end_are_counted_together():
    inspection = Inspection(open_source("digits"), 3000)
    inspection.keep(0, ImageFacts("a", 1, 1, 1, "c", 1))
    letters = ["".join("abcdefghij"[int(d)] for d in str(i)) for i in range(2999)]
    for row, reason in enumerate(letters, start=1):
        inspection.keep(row, ("x", reason))
    reasons = inspection.summary()["unreadable"]["reasons"]
    assert len(reasons) == 10
    assert reasons["other reasons"] == 1999
