"""The number of worker processes, and what is said about it."""

import warnings

from dmjd.data import worker_limits, workers
from dmjd.data.workers import read_batches


def test_more_workers_than_cores_are_said_once_in_our_words(monkeypatch):
    monkeypatch.setattr(workers, "available_cores", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    worker_limits.warn_of_many.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert list(read_batches(abs, [-1, -2], num_workers=2)) == [1, 2]
    assert [str(one.message) for one in caught] == [
        "2 data loading processes share 1 CPU core(s): unless they wait for a slow disk or network, more than 1 are no "
        "faster (--num-workers)"
    ]
