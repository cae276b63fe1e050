"""Run parts of the GPU kit, each within given seconds, on a machine without a package index.

    python3 benchmarks/gpu/run.py check=150 speed=300 --out OUT     # parts in this order, with their seconds
    python3 benchmarks/gpu/run.py --minutes-left 9                  # what to run first; runs nothing

Parts: check (the tests marked ``cuda``), speed, loader, similarity, study. Wheels of the packed folder that are not
installed, or older than ``pyproject.toml`` asks for, are installed into a temporary folder. Every part but the study
writes ``OUT/<part>.json`` after each of its steps and continues what ``benchmarks/results/gpu/`` holds; a part that
fails or runs out of time does not stop the others. ``--device cpu --toy`` runs all of it in small on any machine.

OUT gets at most eight files of at most 16 MiB. Copy them to ``benchmarks/results/gpu/`` for the next run.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from plan import OVERTIME, PARTS, first_call
from record import RESULTS, ROOT

WARM_LONGER = 15  # seconds that compilation may take longer than the parts beside it

MAX_FILES, MAX_BYTES = 8, 16 << 20


def floors() -> dict[str, str]:
    """Package -> lowest version, from ``pyproject.toml``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {plain(name): floor for name, floor in re.findall(r'"([\w.-]+)>=([\d.]+)"', text)}


def plain(name: str) -> str:
    """Normalized name of a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_older(one: str, other: str) -> bool:
    """Compare versions by their numbers."""
    first, second = ([int(n) for n in [*re.findall(r"\d+", text), 0, 0, 0][:3]] for text in (one, other))
    return first < second


def needed_wheels(folder: Path) -> list[Path]:
    """Wheels of packages that are not installed, or older than required."""
    lowest, needed = floors(), []
    for wheel in sorted(folder.glob("*.whl")):
        name = plain(wheel.name.split("-")[0])
        try:
            if not is_older(version(name), lowest.get(name, "0")):
                continue
        except PackageNotFoundError:
            pass
        needed.append(wheel)
    return needed


def install(wheels: list[Path], site: Path) -> None:
    """Install wheels into a folder, without an index and without dependencies."""
    if wheels:
        print("installing", ", ".join(wheel.name.split("-")[0] for wheel in wheels), flush=True)
        flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", "install", *flags, *map(str, wheels)], check=True)


def environment(site: Path) -> dict[str, str]:
    """Variables of the parts: where modules are, no network, caches outside the tree."""
    here = Path(__file__).parent
    paths = [site, ROOT / "src", here, here.parent / "speed"]
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(site / "hf"),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "dmjd_inductor"),  # a second call reuses it
    }
    return os.environ | own


def start(script: str, seconds: int, options: argparse.Namespace, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a script of this folder in a process group of its own."""
    command = [sys.executable, str(Path(__file__).parent / script), "--seconds", str(seconds)]
    command += ["--out", str(options.out), "--device", options.device, "--pack", str(options.pack)]
    command += ["--toy"] if options.toy else []
    return subprocess.Popen(command, env=variables, cwd=ROOT, start_new_session=True)


def run_part(part: str, seconds: int, options: argparse.Namespace, variables: dict[str, str]) -> int:
    """Run a part in a process group of its own, and stop it when its time is up."""
    print(f"\n=== {part}: at most {seconds} s", flush=True)
    started = time.monotonic()
    process = start(f"part_{part}.py", seconds, options, variables)
    try:
        code = process.wait(timeout=seconds + OVERTIME)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            code = process.wait(timeout=OVERTIME)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    print(f"=== {part}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
    return code


def run_parts(wanted: dict[str, int], options: argparse.Namespace, variables: dict[str, str]) -> list[int]:
    """Run the parts in their order; returns their exit codes."""
    before = list(wanted).index("speed") if "speed" in wanted else 0
    warming, codes = None, []
    if before:
        seconds = sum(list(wanted.values())[:before]) + WARM_LONGER
        warming = start("warm.py", seconds, options, variables)  # compiles what the speed part needs
    for part, seconds in wanted.items():
        if part == "speed" and warming is not None:
            warming.wait()  # it ends by itself
        codes.append(run_part(part, seconds, options, variables))
    return codes


def check_out(out: Path) -> None:
    """Say which files are more or larger than what comes back."""
    files = [file for file in sorted(out.rglob("*")) if file.is_file()]
    for file in files:
        size = file.stat().st_size
        print(f"{size / 2**20:8.2f} MiB  {file.relative_to(out)}" + ("  TOO LARGE" if size > MAX_BYTES else ""))
    if len(files) > MAX_FILES:
        print(f"{len(files)} files: MORE than the {MAX_FILES} that come back")


def main() -> int:
    """Install what is missing and run the parts; returns 0 if all of them ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"part=seconds; parts: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="results; default $OUT")
    parser.add_argument("--pack", type=Path, default=ROOT / ".gpu", help="folder made by pack.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="everything in small")
    parser.add_argument("--minutes-left", type=float, help="print what to run first with so many minutes")
    options = parser.parse_args()
    if options.minutes_left is not None:
        print(first_call(options.minutes_left, RESULTS))
        return 0
    wanted = [part.partition("=") for part in options.parts]
    if not wanted or options.out is None or any(part not in PARTS or not n.isdigit() for part, _, n in wanted):
        parser.error("give part=seconds for each part, and --out")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        install(needed_wheels(options.pack / "wheels"), site)
        codes = run_parts({part: int(n) for part, _, n in wanted}, options, environment(site))
    check_out(options.out)
    print("\nnext:", first_call(0, options.out))
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
