"""Similarity: near duplicates and nearest neighbors among up to half a million features."""

import time

from options import Options, part_options
from record import Clock, Record, versions
from similarity import features

from dmjd.pretraining.bench import machine, wait
from dmjd.similarity import near_duplicates, nearest_neighbors

WIDTH = 384

SIZES = (100_000, 500_000)  # the time grows with the square: 0.5 s for 100,000 on an H200


def run(options: Options) -> None:
    """Each size, as long as there is time for it."""
    clock, record = Clock(options.seconds), Record("similarity", options.out)
    where = machine(options.device)
    card = f"{where['gpu'] or where['cpu']}{', toy' if options.toy else ''}"
    record.describe(machine=where, versions=versions(), complete=False)
    for count in (200, 2000) if options.toy else SIZES:
        for name, function in (("near duplicates", near_duplicates), ("nearest neighbors", nearest_neighbors)):
            key = f"{card} | {name} | {count} x {WIDTH}"
            if key in record.entries or clock.left < 5:
                continue
            x = features(count, WIDTH)
            wait(options.device)
            started = time.perf_counter()
            function(x, device=options.device)
            seconds = time.perf_counter() - started
            record.put(key, {"seconds": seconds})
            print(f"{key}: {seconds:.2f} s", flush=True)
    complete = len(record.entries) >= 2 * len(SIZES)
    record.describe(complete=complete)


if __name__ == "__main__":
    run(part_options(__doc__))
