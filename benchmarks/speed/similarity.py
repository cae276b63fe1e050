"""Time of near duplicates and nearest neighbors among the features of a set, and the time that a larger set would take.

python benchmarks/speed/similarity.py --images 100000 --width 384

The time grows with the square of the number of images. Features are clouds around random centers; one image in fifty is
a near duplicate.
"""

import argparse
import time

import torch

from dmjd.similarity import near_duplicates, nearest_neighbors


def features(images: int, width: int, seed: int = 0) -> torch.Tensor:
    """[images, width] float32."""
    random = torch.Generator().manual_seed(seed)
    centers = torch.randn(2000, width, generator=random)
    x = centers[torch.randint(2000, (images,), generator=random)] + 0.6 * torch.randn(images, width, generator=random)
    copies = x[: images - 1 : 50]
    x[1::50][: len(copies)] = copies + 0.01 * torch.randn(len(copies), width, generator=random)
    return x


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--larger", type=int, default=1_000_000, help="number of images to extrapolate to")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    x = features(given.images, given.width)
    print(f"{given.images:,} x {given.width} on {given.device}, {torch.get_num_threads()} thread(s)\n")
    print(f"| | wall s | processor s | {given.larger:,} images, s |\n|---|---|---|---|")
    tasks = {
        "near duplicates": lambda: near_duplicates(x, device=given.device),
        "nearest neighbor": lambda: nearest_neighbors(x, 1, given.device),
        "5 nearest neighbors": lambda: nearest_neighbors(x, 5, given.device),
    }
    for name, task in tasks.items():
        wall, processor = time.perf_counter(), time.process_time()
        task()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        # Where processes share a core, processor time says what the core alone would need.
        alone = processor if given.device == "cpu" else wall
        print(f"| {name} | {wall:.1f} | {processor:.1f} | {alone * (given.larger / given.images) ** 2:.0f} |")


if __name__ == "__main__":
    main()
