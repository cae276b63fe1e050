"""Pack what the GPU kit needs into a folder that git ignores, check the size, print the call.

    python benchmarks/gpu/pack.py --data shared/cifar10

The folder ``.gpu/`` gets the images of CIFAR-10 (parquet with zstd, a third of its size, because the tables in the
headers of all JPEGs are the same), and wheels for Python 3.12 of what a machine with torch, timm and lightning lacks.
The tree and the folder together may take at most 64 MiB.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from plan import OVERTIME, calls, command_line
from record import RESULTS, ROOT

MAX_BYTES = 64 << 20

MAX_COMMAND = 2000  # characters

# What is missing there, and timm, in case it is older than required. An older `datasets`, because newer versions need
# a newer pyarrow than may be there.
WHEELS = ("datasets==4.4.2", "dill==0.4.0", "multiprocess==0.70.18", "simplejpeg", "msgspec", "timm", "pycocotools")

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack_images(source: Path, file: Path) -> None:
    """Rewrite a parquet file with better compression. Equal input gives equal bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(source)
    pq.write_table(
        table,
        file,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        row_group_size=len(table),
        data_page_size=64 << 20,
    )


def pack_wheels(folder: Path) -> None:
    """Download the wheels, without what they depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    flags = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    flags += [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *flags, "-d", folder, *WHEELS], check=True)


def tree_bytes() -> int:
    """Bytes of the files that travel without being named: tracked, and untracked but not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in set(names) if name]
    return sum(file.stat().st_size for file in files if file.is_file())


def describe(folder: Path) -> dict[str, str]:
    """File -> SHA-256."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_size(folder: Path) -> int:
    """Print the sizes; returns their sum, at most 64 MiB."""
    packed = {file.name: file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    for name, size in {"the tree": tree_bytes(), **packed}.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = tree_bytes() + sum(packed.values())
    print(f"{total / 2**20:8.2f} MiB  together, at most {MAX_BYTES >> 20}")
    if total > MAX_BYTES:
        sys.exit("too large: move untracked files away, or delete what scripts can write again")
    return total


def call(given: dict[str, int], folder: Path) -> str:
    """The command for the other machine, and what to carry."""
    command = f'set -o pipefail; {command_line(given)} --out "$OUT" 2>&1 | tee "$OUT/log.txt"'
    assert len(command) <= MAX_COMMAND
    seconds = sum(given.values()) + OVERTIME * len(given) + 30
    return f"command:  {command}\ncarry:    {folder.relative_to(ROOT)}\nseconds:  {seconds}"


def main() -> None:
    """Pack, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--minutes", type=float, default=14, help="GPU time that is left")
    options = parser.parse_args()
    folder = ROOT / ".gpu"
    for split in ("train", "test"):
        pack_images(options.data / f"{split}.parquet", folder / "cifar10" / f"{split}.parquet")
    pack_wheels(folder / "wheels")
    (folder / "manifest.json").write_text(json.dumps(describe(folder), indent=1) + "\n", encoding="utf-8")
    check_size(folder)
    for number, given in enumerate(calls(options.minutes, RESULTS), 1):
        print(f"\ncall {number}, on the machine of the first\n{call(given, folder)}")
    print("\nafter each call: copy what is under $OUT to benchmarks/results/gpu/, then benchmarks/gpu/report.py")


if __name__ == "__main__":
    main()
