"""Fetch the shards of the window that is read, and of the next one, in a thread of the training process."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

from dmjd.data.windows import ShardStore, WindowedPermutations
from dmjd.data.workers import TIMEOUT, LoaderError, wait_limit

_POLL = 1.0  # seconds between looks at the progress of a transfer


class FetchAhead:
    """Fetches shards as training goes on. Shards of former windows make room for those of the next one.

    Args:
        order: the order of the images.
        store: fetches the shards.
        start_step: the first step.
        batch_size: samples of a step, over all processes. They are at most a step apart, so that what one still needs
            never takes the room of what it waits for.

    Workers get a request when the shards of its step are here, unless the step ends more than one window ahead of what
    is trained on; then, and for images that replace unreadable ones, they fetch the images one by one.
    """

    def __init__(self, order: WindowedPermutations, store: ShardStore, start_step: int, batch_size: int) -> None:
        self._order, self._store, self._batch_size = order, store, batch_size
        self._changed = threading.Condition()
        self._current = order.window(start_step * batch_size)  # what was received lies here
        self._ready = self._current - 1  # the last window whose shards are here
        self._closed = False
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._fetch, name="fetch-ahead", daemon=True)

    def when_here(self, requests: Iterable[range]) -> Iterator[range]:
        """The requests, each when the shards of its samples are in the cache.

        Raises:
            ValueError: if a shard cannot be fetched.
            LoaderError: if nothing arrives for :func:`~dmjd.data.workers.wait_limit` seconds.
        """
        self._thread.start()  # not before workers were forked
        for samples in requests:
            step = samples[0] // self._batch_size
            self._wait_for(self._order.window((step + 1) * self._batch_size - 1))
            yield samples

    def received(self, samples: range) -> None:
        """All requests before this one, and it, were read: earlier windows are not needed any more."""
        window = self._order.window(samples[0] // self._batch_size * self._batch_size)
        with self._changed:
            if window > self._current:
                self._current = window
                self._changed.notify_all()

    def close(self) -> None:
        """Fetch no further shard, and keep none."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            with contextlib.suppress(ValueError):  # a cache that fails now does no harm
                self._store.need(())

    def _wait_for(self, window: int) -> None:
        arrived, since = -1, time.monotonic()
        while True:
            with self._changed:
                if self._problem is not None:
                    raise self._problem
                if self._ready >= window or window > self._current + 1 or self._closed:
                    return
                self._changed.wait(_POLL)
                coming = self._order.shards(self._ready + 1)
            now = self._store.arrived(coming)
            if now != arrived:
                arrived, since = now, time.monotonic()
            elif time.monotonic() - since >= wait_limit():
                raise LoaderError(
                    f"nothing of a shard has arrived for {wait_limit() / 60:g} minute(s): the network may hang, or "
                    "other processes need the cache (see --cache-gb); the same command goes on, and "
                    f"{TIMEOUT} sets a longer limit (in minutes)"
                )

    def _fetch(self) -> None:
        """Keep the shards of the current window and the next one."""
        try:
            while True:
                with self._changed:
                    while self._ready > self._current and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    window = max(self._ready + 1, self._current)
                    needed = [shard for w in range(self._current, window + 1) for shard in self._order.shards(w)]
                    self._store.need(needed)
                with contextlib.closing(self._store.fetch(self._order.shards(window))) as fetched:
                    for _ in fetched:
                        if self._closed:
                            return
                with self._changed:
                    self._ready = window
                    self._changed.notify_all()
        except Exception as error:  # raised in the thread that waits
            with self._changed:
                self._problem = error
                self._changed.notify_all()
