"""Rehearse two visits to a GPU machine on this one: all parts, to the end, with ``--device cpu --toy``.

    python benchmarks/gpu/pack.py --data shared/cifar10
    python benchmarks/gpu/rehearse.py --data shared/cifar10 --python python3.12

Builds an environment with what such a machine has (``machine.txt``; several gigabytes), exports the last commit without
anything beside it, adds the packed folder, and runs every part without network, and all but the study once more. The
second visit must continue what the first left. About a quarter of an hour on two cores, once the environment is there;
with ``--env`` it is kept for the next time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from part_study import SEEDS, VARIANTS
from record import ROOT
from run import MAX_BYTES, MAX_FILES

SECONDS = {"check": 1500, "speed": 600, "loader": 120, "similarity": 60, "study": 900}

# No index, and a proxy that does not exist; one thread, because steps of toys are too small for several.
APART = {"PIP_NO_INDEX": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"} | {
    "OMP_NUM_THREADS": "1"
}


def build_environment(folder: Path, python: str) -> Path:
    """A virtual environment with the packages of the machine; returns its interpreter."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        listed = str(Path(__file__).with_name("machine.txt"))
        subprocess.run([interpreter, "-m", "pip", "install", "-q", "--no-compile", "-r", listed], check=True)
    return interpreter


def export_tree(folder: Path) -> None:
    """The files of the last commit, and the packed folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    shutil.copytree(ROOT / ".gpu", folder / ".gpu")


def variables() -> dict[str, str]:
    """The environment of the commands: nothing of this one's Python, no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    return kept | APART


def visit(interpreter: Path, tree: Path, out: Path, parts: list[str]) -> dict[str, Any]:
    """Run parts; check what comes back and put it where the next visit finds it; returns the JSON files."""
    wanted = [f"{part}={SECONDS[part]}" for part in parts]
    command = [interpreter, "benchmarks/gpu/run.py", *wanted, "--out", out, "--device", "cpu", "--toy"]
    code = subprocess.run(list(map(str, command)), cwd=tree, env=variables()).returncode
    files = sorted(file for file in out.rglob("*") if file.is_file())
    expect(code == 0, f"exit code {code}")
    expect(len(files) <= MAX_FILES - 1, f"{len(files)} files and a log come back, at most {MAX_FILES}")
    expect(all(file.stat().st_size <= MAX_BYTES for file in files), "a file is too large")
    results = tree / "benchmarks" / "results" / "gpu"
    results.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, results)
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".json"}
    expect(set(found) >= set(parts), f"results of {sorted(found)} only")
    return found


def expect(condition: bool, message: str) -> None:
    """End the rehearsal unless a condition holds."""
    if not condition:
        sys.exit(f"REHEARSAL FAILED: {message}")


def check_results(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The first visit measured everything, and the second nothing again."""
    for name, entry in first["check"]["entries"].items():
        expect(entry["outcome"] in ("passed", "skipped"), f"{name}: {entry.get('text', '')[-600:]}")
    passed = {name for name, entry in first["check"]["entries"].items() if entry["outcome"] == "passed"}
    expect(len(passed) > 50, f"only {len(passed)} tests passed")
    for part in ("speed", "loader", "similarity"):
        for name, entry in first[part]["entries"].items():
            expect("error" not in entry and "running" not in entry, f"{part}: {name}: {entry}")
        expect(first[part]["complete"], f"{part} is not complete")
    for part in ("check", "speed", "loader", "similarity"):
        kept = {k: v for k, v in first[part]["entries"].items() if part != "check" or k in passed}
        again = {k: second[part]["entries"][k] for k in kept}
        expect(again == kept, f"{part} was measured again")
    runs, expected = first["study"]["runs"], len(VARIANTS) * SEEDS
    expect(len(runs) == expected, f"{len(runs)} runs of the study, not {expected}")
    expect(all("test" in run for run in runs), "the runs of the study were not tested")


def main() -> None:
    """Build, export, run twice, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--python", default="python3.12", help="interpreter for the environment")
    parser.add_argument("--env", type=Path, help="environment to make, or to use again; default a temporary one")
    given = parser.parse_args()
    expect((ROOT / ".gpu" / "manifest.json").exists(), "pack first: benchmarks/gpu/pack.py")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        interpreter = build_environment((given.env or work / "env").absolute(), given.python)
        export_tree(work / "tree")
        first = visit(interpreter, work / "tree", work / "out1", list(SECONDS))
        second = visit(interpreter, work / "tree", work / "out2", [part for part in SECONDS if part != "study"])
        check_results(first, second)
        command = [interpreter, "benchmarks/gpu/report.py"]
        subprocess.run(list(map(str, command)), cwd=work / "tree", env=variables(), check=True)
    print("\nthe rehearsal passed")


if __name__ == "__main__":
    main()
