"""Loading speed: JPEGs from disk, small sets in memory, and the listing of a large folder.

    python benchmarks/speed/loader.py --json benchmarks/results/loader.json

One core. Processor time of this process counts. All rows of a table alternate within one run, and the best round of
each counts, so other load on the machine favors none. The JPEGs are generated: 500 x 375 pixels, smooth colors with
texture, about 60 KB each. First our crops are compared with Pillow's crops of the same boxes; the benchmark stops if
they differ by more than resampling does.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg

from dmjd.data.order import permutation
from dmjd.data.sources.base import Source
from dmjd.data.sources.folder import FolderSource
from dmjd.data.train_loader import TrainLoader
from dmjd.data.transforms import crop_boxes, flips
from dmjd.engine.device import keep_freed_memory
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

WIDTH, HEIGHT, QUALITY = 500, 375, 83
BATCH = 64
CIFAR_BATCH = 256


def image(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colors on four scales and fine grain: [height, width, 3] uint8."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((4, 65), (12, 42), (40, 26), (120, 14)):
        gray = rng.standard_normal((cells, cells + 2, 1), np.float32)
        coarse = gray + 0.5 * rng.standard_normal((cells, cells + 2, 3), np.float32)
        planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += strength * np.stack([np.asarray(plane) for plane in planes], -1)
    total += rng.uniform(4, 14) * rng.standard_normal((height, width, 1), np.float32)
    return total.clip(0, 255).astype(np.uint8)


def make_jpegs(folder: Path, count: int, height: int = HEIGHT, width: int = WIDTH) -> list[bytes]:
    """Write ``count`` images into a folder and return their bytes."""
    for seed in range(count):
        Image.fromarray(image(seed, height, width)).save(folder / f"{seed:05d}.jpg", quality=QUALITY)
    return [(folder / f"{seed:05d}.jpg").read_bytes() for seed in range(count)]


def in_turns(ways: dict[str, Callable[[], int]], turns: int) -> dict[str, float]:
    """Items per second of each function, the best of several rounds; a function returns the number of its items."""
    best = dict.fromkeys(ways, 0.0)
    for way in ways.values():
        way()
    for _ in range(turns):
        for name, way in ways.items():
            began = time.process_time()
            done = way()
            best[name] = max(best[name], done / (time.process_time() - began))
    return best


def difference(loader: TrainLoader, pillows: Callable[[int, list[float]], Image.Image]) -> dict[str, float]:
    """Mean, 99th percentile and largest difference between a batch and Pillow's crops, in levels of 255.

    Args:
        loader: ours.
        pillows: image index and box (top, left, height, width) -> Pillow's crop, not flipped.
    """
    batch = next(loader.batches())
    indices, keys = loader.stream.draw(next(loader.stream.micro_batches(0)))
    assert torch.equal(keys, batch.keys)
    sides = torch.tensor([loader._source.open(int(i)).size for i in indices])
    crops = [np.array(pillows(int(i), box)) for i, box in zip(indices, crop_boxes(keys, sides).tolist(), strict=True)]
    theirs = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    theirs = torch.where(flips(keys).view(-1, 1, 1, 1), theirs.flip(-1), theirs)
    levels = (theirs.int() - batch.images.int()).abs().float()
    tail = float(np.quantile(levels.numpy(), 0.99))
    return {"mean": levels.mean().item(), "99 %": tail, "largest": levels.max().item()}


def check(differences: dict[str, float], mean: float) -> dict[str, float]:
    """Return the differences; exit with an error if the mean is above ``mean`` levels."""
    if differences["mean"] > mean:
        raise SystemExit(f"our crops differ from Pillow's: {differences}")
    return differences


def ordinary_transform(size: int) -> transforms.Compose:
    """The usual transforms of training scripts."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def each(function: Callable[[bytes], Any], images: list[bytes]) -> Callable[[], int]:
    """One round of a function that takes images one by one."""

    def turn() -> int:
        for encoded in images:
            function(encoded)
        return len(images)

    return turn


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """Bare decoding to RGB in memory."""
    return {
        "decode, Pillow": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "decode, torchvision": lambda data: decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        ),
        "decode, simplejpeg": simplejpeg.decode_jpeg,
    }


def ours(loader: TrainLoader, batches: int, normalized: bool = False) -> Callable[[], int]:
    """One round of our loader, with or without the normalization that a run does on its device."""
    endless, preprocess = loader.batches(), Preprocess(loader._augment.size)

    def take() -> Tensor:
        images = next(endless).images
        return preprocess.normalize(images) if normalized else images

    return lambda: sum(len(take()) for _ in range(batches))


def folder_loader(folder: Path, batch_size: int) -> TrainLoader:
    """Crops of 224 pixels, read in this process."""
    return TrainLoader(FolderSource(folder), img_size=(224, 224), batch_size=batch_size, num_workers=0)


def pillows_crops(folder: Path) -> Callable[[int, list[float]], Image.Image]:
    """A crop of a file by the usual pipeline."""
    files = sorted(folder.iterdir())

    def crop(index: int, box: list[float]) -> Image.Image:
        top, left, height, width = box
        whole = Image.open(files[index]).convert("RGB")
        return whole.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BICUBIC)

    return crop


def jpeg_ways(folder: Path, encoded: list[bytes]) -> dict[str, Callable[[], int]]:
    """The usual pipeline, bare decoders, and our loader in this process."""
    files = sorted(folder.iterdir())
    transform = ordinary_transform(224)

    def ordinary() -> int:
        for first in range(0, len(files), BATCH):
            chunk = files[first : first + BATCH]
            torch.stack([transform(Image.open(file).convert("RGB")) for file in chunk])
        return len(files)

    bare = {name: each(function, encoded) for name, function in decoders().items()}
    rows = {"dmjd": False, "dmjd, normalized": True}
    mine = {name: ours(folder_loader(folder, BATCH), len(files) // BATCH, flag) for name, flag in rows.items()}
    return {"ordinary pipeline": ordinary} | bare | mine


@functools.lru_cache
def random_images(count: int) -> np.ndarray:
    """[count, 32, 32, 3] uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


class Arrays(Source):
    """Random images of CIFAR's size and number, already in memory."""

    name = "random"

    def __init__(self, count: int = 50_000) -> None:
        self.images = random_images(count)
        self.classes = []

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, index: int) -> np.ndarray:
        """An array."""
        return self.images[index]

    def describe(self, index: int) -> str:
        """Its number."""
        return f"image {index}"


def memory_ways() -> dict[str, Callable[[], int]]:
    """Batches of 256 crops of 32 x 32: torchvision image by image, and ours."""
    source = Arrays()
    transform = ordinary_transform(32)
    chunks = itertools.cycle(range(0, len(source) - CIFAR_BATCH, CIFAR_BATCH))

    def ordinary() -> int:
        first = next(chunks)
        torch.stack([transform(Image.fromarray(source.images[first + i])) for i in range(CIFAR_BATCH)])
        return CIFAR_BATCH

    loader = memory_loader(source)
    return {
        "per-sample torchvision": ordinary,
        "dmjd": ours(loader, 10),
        "dmjd, normalized": ours(loader, 10, normalized=True),
    }


def memory_loader(source: Arrays) -> TrainLoader:
    """Crops of 32 pixels."""
    return TrainLoader(source, img_size=(32, 32), batch_size=CIFAR_BATCH)


def pillows_small_crop(index: int, box: list[float]) -> Image.Image:
    """Pillow's crop of one of the random images; its filter reads pixels outside the box, as ours does."""
    top, left, height, width = box
    image = Image.fromarray(Arrays().images[index])
    return image.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def photograph_ways(folder: Path) -> dict[str, Callable[[], int]]:
    """12-megapixel images: the usual pipeline and ours, which decodes them at a fraction of their size."""
    files = sorted(folder.iterdir())
    transform = ordinary_transform(224)

    def full() -> int:
        return sum(simplejpeg.decode_jpeg(file.read_bytes()).ndim == 3 for file in files)

    return {
        "ordinary pipeline": lambda: len([transform(Image.open(file).convert("RGB")) for file in files]),
        "decode, simplejpeg": full,
        "dmjd": ours(folder_loader(folder, len(files)), 1),
    }


def listing(folder: Path, count: int) -> dict[str, float]:
    """Seconds to list ``count`` empty files in folders of 1,000, to save the list, and to read it again."""
    for first in range(0, count, 1000):
        inner = folder / f"n{first // 1000:08d}"
        inner.mkdir()
        for i in range(min(1000, count - first)):
            os.close(os.open(f"{inner}/n{first + i:08d}.JPEG", os.O_CREAT | os.O_WRONLY))
    saved = folder / "files.txt"
    seconds = {}
    with took(seconds, "list"):
        source = FolderSource(folder)
    assert len(source) == count
    with took(seconds, "fingerprint"):
        source.fingerprint()
    with took(seconds, "save"):
        source.save_listing(saved)
    with took(seconds, "read again on resume"):
        FolderSource(folder, listing=saved)
    return seconds


def orders() -> dict[str, float]:
    """Seconds to draw the order of an epoch."""
    seconds: dict[str, float] = {}
    for n in (10**6, 10**7):
        with took(seconds, f"order of {n:,} images"):
            permutation(0, 0, n)
    return seconds


@contextlib.contextmanager
def took(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ["torch", "torchvision", "pillow", "simplejpeg", "numpy"]
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"processor": model, "cores": os.cpu_count(), "threads": 1, "versions": versions}


def table(title: str, rates: dict[str, float], base: str) -> None:
    """One line per function: items per second, relative to the base."""
    print(f"\n{title}")
    for name, rate in rates.items():
        print(f"  {name:26s} {rate:10.0f} /s  {rate / rates[base]:6.2f} x")


def main() -> None:
    """Measure, print tables, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result")
    parser.add_argument("--images", type=int, default=128, help="JPEGs, a multiple of 64")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--files", type=int, default=1_000_000, help="in the folder that is listed")
    parser.add_argument("--temp", type=Path, help="folder for generated files; default the system's temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory("cpu")  # as a training run does; both sides benefit
    with tempfile.TemporaryDirectory(dir=arguments.temp) as temp:
        folders = [Path(temp) / name for name in ("jpegs", "photographs", "listing")]
        for folder in folders:
            folder.mkdir()
        encoded = make_jpegs(folders[0], arguments.images)
        kilobytes = sum(map(len, encoded)) / len(encoded) / 1000
        make_jpegs(folders[1], 4, 3000, 4000)
        levels = {
            "jpegs": check(difference(folder_loader(folders[0], BATCH), pillows_crops(folders[0])), 0.1),
            "photographs": check(difference(folder_loader(folders[1], 4), pillows_crops(folders[1])), 1.0),
            "in_memory": check(difference(memory_loader(Arrays()), pillows_small_crop), 0.3),
        }
        jpegs = in_turns(jpeg_ways(folders[0], encoded), arguments.turns)
        photographs = in_turns(photograph_ways(folders[1]), max(2, arguments.turns // 4))
        memory = in_turns(memory_ways(), 2 * arguments.turns)
        seconds = {"files": arguments.files, **listing(folders[2], arguments.files), **orders()}
    bare = max(rate for name, rate in jpegs.items() if name.startswith("decode"))
    table(f"{WIDTH} x {HEIGHT} JPEGs of {kilobytes:.0f} KB, crops of 224", jpegs, "ordinary pipeline")
    print(f"  dmjd: {jpegs['dmjd'] / bare:.0%} of the fastest bare decoder")
    table("4000 x 3000 JPEGs, crops of 224", photographs, "ordinary pipeline")
    table("32 x 32 images in memory", memory, "per-sample torchvision")
    print("\nDifference to Pillow's crops of the same boxes, in levels of 255")
    for name, differences in levels.items():
        print(f"  {name:15s}" + "".join(f"  {what} {value:.3f}" for what, value in differences.items()))
    print(f"\nA folder of {arguments.files:,} files, and orders, in seconds")
    for name, value in list(seconds.items())[1:]:
        print(f"  {name:30s} {value:8.2f}")
    content = machine() | {
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "jpeg_kilobytes": kilobytes,
        "jpegs_per_second": jpegs,
        "share_of_bare_decode": jpegs["dmjd"] / bare,
        "photographs_per_second": photographs,
        "in_memory_per_second": memory,
        "levels_from_pillow": levels,
        "seconds": seconds,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
