"""Time and memory of opening a list of many images, in every format.

OMP_NUM_THREADS=1 python benchmarks/speed/lists.py --images 1000000 --work /tmp/lists

Writes empty files in folders of a thousand, lists of them with labels and splits, and opens each list in a process of
its own: every file is looked for, as before a training. The files stay in --work for a second run.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")

IN_FOLDER = 1000


def write_files(work: Path, count: int) -> list[str]:
    """Empty files below a folder; their relative paths."""
    paths = [f"images/class_{i // IN_FOLDER:05d}/image_{i:08d}.jpg" for i in range(count)]
    for start in range(0, count, IN_FOLDER):
        folder = work / paths[start].rpartition("/")[0]
        if not folder.exists():
            folder.mkdir(parents=True)
            for path in paths[start : start + IN_FOLDER]:
                (work / path).touch()
    return paths


def write_lists(work: Path, paths: list[str]) -> None:
    """One list of each format: path, label and split, one row in ten for testing."""
    rows = [(path, path.split("/")[1], "train" if i % 10 else "test") for i, path in enumerate(paths)]
    (work / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    for ending, sign in (("csv", ","), ("tsv", "\t")):
        lines = (sign.join(row) + "\n" for row in [("path", "label", "split"), *rows])
        (work / f"list.{ending}").write_text("".join(lines))
    named = [dict(zip(("path", "label", "split"), row, strict=True)) for row in rows]
    (work / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    pq.write_table(pa.Table.from_pylist(named), work / "list.parquet")


def measure(file: Path) -> dict[str, float]:
    """Open a list in this process: seconds, and MiB more than before at the most."""
    from dmjd.data.sources.registry import open_source

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, processor = time.perf_counter(), time.process_time()
    source = open_source(file, labels="none" if file.suffix == ".txt" else "column")
    seconds = time.perf_counter() - started
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "images": len(source),
        "seconds": round(seconds, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "mib": round(more / 1024),
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, required=True, help="folder of the files and lists")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.one)))
        return
    write_lists(given.work, write_files(given.work, given.images))
    print("| list | images | wall s | processor s | MiB |\n|---|---|---|---|---|")
    for ending in FORMATS:
        file = given.work / f"list.{ending}"
        command = [sys.executable, __file__, "--work", str(given.work), "--one", str(file)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"| {ending} | " + " | ".join(f"{value:,}" for value in found.values()) + " |")


if __name__ == "__main__":
    main()
