"""Tar and zip files: time and memory of the index, images/s beside the same images as loose files, memory of workers.

    OMP_NUM_THREADS=1 python benchmarks/speed/shards.py --json benchmarks/results/shards.json

Images/s count processor time of this process, on one core, with all files in the page cache. All rows alternate within
one run; a row's ratio to another is the median over the rounds of both, so other load favors none. The parts:

1. The index of small images in many shards: seconds of the first opening (wall and processor time, in this process and
   in several), of the next ones, size of the index and memory.
2. The same JPEGs (500 x 375, about 60 KB) as loose files, in a tar, a stored zip and a deflated zip: in the loader, by
   reading alone, and in the ordinary pipeline of Pillow and torchvision on loose files.
3. What the time of an image in the loader is made of.
4. Private memory and open files of two workers that read the set of part 1, at the start and at the end.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from loader import BATCH, image, machine, make_jpegs, ordinary_transform, ours
from PIL import Image

from dmjd.data.sources import shard_cache
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import open_source
from dmjd.data.train_loader import TrainLoader, stack
from dmjd.data.transforms import crop_boxes, crop_resize, flips
from dmjd.engine.device import keep_freed_memory

CRITERION = 1.0  # images/s from shards, relative to loose files


def make_shards(folder: Path, images: int, shards: int) -> None:
    """Tars of small JPEGs with labels, in WebDataset's layout."""
    encoded = io.BytesIO()
    Image.fromarray(image(0, 48, 48)).save(encoded, "JPEG", quality=80)
    other = io.BytesIO()  # of another size, so that the set is not held in memory
    Image.fromarray(image(1, 40, 48)).save(other, "JPEG", quality=80)
    contents = encoded.getvalue(), other.getvalue()
    per_shard = images // shards
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as file:
            for i in range(shard * per_shard, (shard + 1) * per_shard):
                add(file, f"{i:09d}.jpg", contents[i % 2])
                add(file, f"{i:09d}.cls", str(i % 1000).encode())


def add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def clock() -> tuple[float, float]:
    """Wall time, and processor time of this process and those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


@contextlib.contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[None]:
    """Record wall and processor time of the block."""
    wall, processor = clock()
    yield
    done = clock()
    seconds[name] = {"wall": done[0] - wall, "processor": done[1] - processor}


def measure_index(folder: Path, cache: Path, workers: int) -> dict[str, Any]:
    """Part 1."""
    result: dict[str, Any] = {"shards": len(list(folder.iterdir())), "processes": workers}
    shard_cache.auto_workers = lambda: workers  # type: ignore[assignment]
    before = private_memory(os.getpid())
    with timed(result, "first opening, s"):
        source = open_source(folder)
    result["images"] = len(source)
    for name, options in (("next openings, s", {}), ("with labels, s", {"labels": "column"})):
        with timed(result, name):
            open_source(folder, **options)
    with timed(result, "fingerprint, s"):
        source.fingerprint()
    with timed(result, "index of a run, s"):
        source.save_listing(cache / "files.txt")
    index = next((cache / "dmjd" / "shards").glob("*.arrow"))
    result["index, bytes per image"] = index.stat().st_size / len(source)
    result["private memory of the open set, MB"] = private_memory(os.getpid()) - before
    result["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def private_memory(process: int) -> float:
    """Memory that a process shares with no other, MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def pack(loose: Path, folder: Path) -> dict[str, Path]:
    """The files of a folder in a tar and in zips."""
    files = sorted(loose.iterdir())
    paths = {"tar": folder / "a.tar", "stored zip": folder / "stored.zip", "deflated zip": folder / "deflated.zip"}
    with tarfile.open(paths["tar"], "w") as tar:
        for file in files:
            tar.add(file, file.name)
    for name, method in (("stored zip", zipfile.ZIP_STORED), ("deflated zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(paths[name], "w", method) as packed:
            for file in files:
                packed.write(file, file.name)
    return paths


def in_rounds(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Items per second of each function in each round; the order turns, so that none always follows the same one."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.process_time()
            done = ways[name]()
            if number >= 0:  # the first round warms up
                rates[name].append(done / (time.process_time() - began))
    return rates


def ratio(rates: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the ratio of two rows."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True))


def loader_of(source: Source) -> TrainLoader:
    """Crops of 224 pixels, in this process."""
    return TrainLoader(source, img_size=(224, 224), batch_size=BATCH, num_workers=0)


def reading(source: Source, packed: bool) -> Callable[[], int]:
    """One round of reading the encoded images of a set, in the order of an epoch."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()

    def turn() -> int:
        for index in order:
            stored = source.stored(index)
            if not packed:
                with open(stored, "rb") as file:
                    file.read()
        return len(order)

    return turn


def speed_ways(loose: Path, packed: dict[str, Path]) -> tuple[dict[str, Callable[[], int]], ...]:
    """Part 2: through the loader, and reading alone."""
    sources = {"loose files": open_source(loose)} | {name: open_source(path) for name, path in packed.items()}
    batches = len(sources["loose files"]) // BATCH
    files, transform = sorted(loose.iterdir()), ordinary_transform(224)
    encoded = [file.read_bytes() for file in files]

    def ordinary() -> int:
        for first in range(0, len(files), BATCH):
            torch.stack([transform(Image.open(file).convert("RGB")) for file in files[first : first + BATCH]])
        return len(files)

    def bare() -> int:
        return len([simplejpeg.decode_jpeg(content) for content in encoded])

    loaders = {name: ours(loader_of(source), batches) for name, source in sources.items()}
    return (
        loaders | {"ordinary pipeline, loose files": ordinary, "decode alone, simplejpeg": bare},
        {name: reading(source, name != "loose files") for name, source in sources.items()},
    )


def stages(source: Source, rounds: int) -> dict[str, float]:
    """Part 3: processor time of each stage of an image in the loader, in microseconds; the least of the rounds."""
    loader = loader_of(source)
    indices, keys = loader.stream.draw(next(loader.stream.micro_batches(0)))
    least: dict[str, float] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        took = 1e6 * (time.process_time() - began) / len(indices)
        least[name] = min(least.get(name, took), took)
        return result

    endless = loader.batches()
    for _ in range(rounds):
        stage("read", lambda: [source.stored(int(i)) for i in indices])
        opened = stage("read and parse the header", lambda: [source.open(int(i)) for i in indices])
        sides = torch.tensor([one.size for one in opened])
        boxes = stage("draw the crops", lambda sides=sides: crop_boxes(keys, sides, (0.5, 1.0))).tolist()
        pairs = list(zip(opened, boxes, strict=True))
        decoded = stage("decode", lambda pairs=pairs: [one.read_for(box, (224, 224)) for one, box in pairs])
        turns = list(zip(decoded, flips(keys).tolist(), strict=True))
        crops = stage(
            "crop and resize", lambda turns=turns: [crop_resize(*one, (224, 224), flip) for one, flip in turns]
        )
        stage("stack", lambda crops=crops: stack(crops))
        stage("all, in the loader", lambda: next(endless))
    return least


def measure_workers(source: Source, batches: int) -> dict[str, Any]:
    """Part 4."""
    endless = TrainLoader(source, img_size=(32, 32), batch_size=256, num_workers=2).batches()
    marks: dict[str, Any] = {}
    children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    for number in range(1, batches + 1):
        next(endless)
        if number in (batches // 10, batches):
            workers = [int(word) for word in Path(children).read_text().split()]
            marks[f"after {number} batches"] = {
                "private memory, MB": [round(private_memory(worker), 1) for worker in workers],
                "open files": [len(os.listdir(f"/proc/{worker}/fd")) for worker in workers],
            }
    endless.close()
    return marks


def report(rates: dict[str, list[float]], title: str) -> dict[str, Any]:
    """Print a table; returns medians and ratios to loose files."""
    print(f"\n{title}")
    result = {}
    for name, values in rates.items():
        result[name] = {"median": statistics.median(values), "best": max(values), "rounds": values}
        result[name]["to loose files"] = ratio(rates, name, "loose files")
        print(f"  {name:32s} {max(values):9.0f} /s  {result[name]['to loose files']:6.3f} x loose files")
    return result


def main() -> None:
    """Measure, print tables, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result")
    parser.add_argument("--images", type=int, default=1_000_000, help="small images that are indexed")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--jpegs", type=int, default=256, help="JPEGs that are loaded, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, default=1000, help="that workers read, of 256 images")
    parser.add_argument("--temp", type=Path, help="folder for generated files; default the system's temporary folder")
    parser.add_argument("--note", help="what else ran on the machine")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory("cpu")  # as a training run does
    result: dict[str, Any] = machine() | {"date": date.today().isoformat(), "note": given.note}
    result["load average before"] = os.getloadavg()
    with tempfile.TemporaryDirectory(dir=given.temp) as temp:
        folders = [Path(temp) / name for name in ("cache", "small", "jpegs", "packed", "cache of one")]
        for folder in folders:
            folder.mkdir()
        cache, small, loose, packed_in, second = folders
        make_shards(small, given.images, given.shards)
        for where, workers, name in ((second, 0, "index, this process"), (cache, 2, "index, two processes")):
            os.environ["XDG_CACHE_HOME"] = str(where)
            result[name] = measure_index(small, where, workers)
            print(name, json.dumps(result[name], indent=1))
        make_jpegs(loose, given.jpegs)
        packed = pack(loose, packed_in)
        loading, reads = speed_ways(loose, packed)
        result["images/s"] = report(in_rounds(loading, given.rounds), "Crops of 224 from 500 x 375 JPEGs, one core")
        result["images/s, read only"] = report(in_rounds(reads, 4 * given.rounds), "Reading alone")
        result["microseconds"] = {name: stages(open_source(path), given.rounds) for name, path in packed.items()}
        result["microseconds"]["loose files"] = stages(open_source(loose), given.rounds)
        print(json.dumps(result["microseconds"], indent=1))
        result["workers"] = measure_workers(open_source(small), given.batches)
        print(json.dumps(result["workers"], indent=1))
    result["criterion"] = {"tar to loose files": result["images/s"]["tar"]["to loose files"], "at least": CRITERION}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
