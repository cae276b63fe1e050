"""Run the storm: kills, full disks, hostile files and wrong command lines; write and print its table.

python benchmarks/reliability.py

About an hour on two cores. The cases are in ``tests/storm``; every seed is fixed. A case survives if nothing is lost,
nothing is wrong in silence, and no traceback is shown. With files as arguments, only their rows are replaced.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the tests and write ``results/reliability.json``; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.json")
    parser.add_argument("tests", nargs="*", default=["tests/storm"], help="files or folders of tests")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "table.jsonl"
        pytest = [sys.executable, "-m", "pytest", "-m", "slow", "-n", "2", "--dist", "loadscope", *given.tests]
        environment = os.environ | {"DMJD_STORM_TABLE": str(lines)}
        status = subprocess.run(pytest, cwd=ROOT, env=environment).returncode
        rows = summed([json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else [])
    if not rows:
        print("no case ran", file=sys.stderr)
        return status or 1
    today = date.today().isoformat()
    before = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    kept = [row for row in before if row["part"] not in {new["part"] for new in rows}]
    result = {
        "machine": f"{platform.system()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": sorted([*kept, *({**row, "date": today} for row in rows)], key=lambda row: row["part"]),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))
    return status


def summed(rows: list[dict]) -> list[dict]:
    """One row for each part: some parts have several tests."""
    sums: dict[str, dict] = {}
    for row in rows:
        part = sums.setdefault(row["part"], {"part": row["part"], "tried": 0, "survived": 0, "lost": 0})
        for key in ("tried", "survived", "lost"):
            part[key] += row[key]
    return list(sums.values())


def table(rows: list[dict]) -> str:
    """The rows as Markdown, with their sum."""
    total = {key: sum(row[key] for row in rows) for key in ("tried", "survived", "lost")}
    lines = ["| part | tried | survived | lost |", "|---|---|---|---|"]
    lines += [
        f"| {r['part']} | {r['tried']} | {r['survived']} | {r['lost']} |" for r in [*rows, {"part": "all"} | total]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
