"""Loader: images/s from JPEG files to the device, by the number of worker processes."""

import itertools
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

from loader import HEIGHT, QUALITY, WIDTH, image
from options import Options, part_options
from PIL import Image
from record import Clock, Record, versions

from dmjd.data.sources.folder import FolderSource
from dmjd.data.train_loader import TrainLoader
from dmjd.data.workers import available_cores
from dmjd.pretraining.bench import machine, wait

IMAGES, BATCH, SECONDS = 512, 256, 4.0

LINKS = 8  # names per file, so that the set is too large to be kept in memory

WORKERS = (16, 8, 4, 1)


def write_jpeg(folder: str, seed: int) -> int:
    """Write one generated photograph; returns its bytes."""
    file = Path(folder) / f"{seed:05d}.jpg"
    Image.fromarray(image(seed)).save(file, quality=QUALITY)
    return file.stat().st_size


def fill(folder: Path, cores: int, count: int) -> float:
    """Write ``count`` photographs, each under several names; returns their mean size in kilobytes."""
    with ProcessPoolExecutor(cores) as pool:
        sizes = list(pool.map(write_jpeg, itertools.repeat(str(folder)), range(count), chunksize=8))
    for file, link in itertools.product(sorted(folder.iterdir()), range(1, LINKS)):
        os.link(file, folder / f"{file.stem}-{link}.jpg")
    return sum(sizes) / count / 1000


def rate(folder: Path, workers: int, options: Options) -> dict[str, float]:
    """Images/s of the loader, after its workers have started."""
    batch = 16 if options.toy else BATCH
    loader = TrainLoader(
        FolderSource(folder), img_size=(224, 224), batch_size=batch, num_workers=workers, device=options.device
    )
    assert options.toy or not loader.in_memory
    started = time.perf_counter()
    with closing(loader.batches()) as batches:
        for _ in range(2 if options.toy else 2 * max(1, workers)):
            next(batches)
        wait(options.device)
        first, began, count = time.perf_counter() - started, time.perf_counter(), 0
        for _ in itertools.count():
            next(batches)
            count += batch
            if time.perf_counter() - began > (0.5 if options.toy else SECONDS):
                break
        wait(options.device)
        return {"images_per_s": count / (time.perf_counter() - began), "warmup_s": first}


def run(options: Options) -> None:
    """Measure every number of workers that this machine has cores for."""
    clock, record, cores = Clock(options.seconds), Record("loader", options.out), available_cores()
    where = machine(options.device)
    card = f"{where['gpu'] or where['cpu']}, {cores} cores{', toy' if options.toy else ''}"
    record.describe(machine=where, versions=versions(), complete=False)
    count = 32 if options.toy else IMAGES
    with tempfile.TemporaryDirectory() as folder:
        kilobytes, missing = fill(Path(folder), cores, count), False
        for workers in sorted({min(n, cores) for n in WORKERS} | {0}, reverse=True):
            key = f"{card} | {workers} workers"
            if key in record.entries:
                continue
            if clock.left < 3 * SECONDS:
                missing = True
                continue
            found = rate(Path(folder), workers, options)
            record.put(key, found | {"kilobytes": kilobytes, "pixels": [HEIGHT, WIDTH]})
            print(f"{workers} workers: {found['images_per_s']:.0f} images/s", flush=True)
    record.describe(complete=not missing)


if __name__ == "__main__":
    run(part_options(__doc__))
