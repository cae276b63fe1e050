"""Check: the tests marked ``cuda``, on the device, each outcome written as it comes.

Tests that passed on an earlier visit with the same code are left out.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from options import Options, part_options
from record import ROOT, Record, versions

from dmjd.data.workers import available_cores
from dmjd.pretraining.bench import machine

WORKERS = 10  # processes that share the card; most of their time is spent on the host


def code_hash() -> str:
    """Hash of the package and its tests."""
    digest = hashlib.sha256()
    for folder in ("src", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def test_files() -> list[str]:
    """Files with tests that need a card: values first, then training, then whole commands."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), reverse=True)
    return [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text(encoding="utf-8")]


def run(options: Options) -> int:
    """Run the tests that have not passed yet; returns pytest's exit code."""
    record, code = Record("check", options.out), code_hash()
    device = options.device.type
    where = machine(options.device)
    record.describe(machine=where, versions=versions(), device=device, complete=False)
    codes = {name: entry["code"] for name, entry in record.entries.items() if entry["outcome"] == "passed"}
    passed = [name for name in codes if codes[name] == code]
    print(f"{len(passed)} tests passed earlier with this code", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "check.json"
        known = {"out": str(options.out), "code": code, "passed": passed, "earlier": sorted(set(codes) - set(passed))}
        given.write_text(json.dumps(known), encoding="utf-8")
        workers = 2 if device == "cpu" else min(WORKERS, available_cores())
        flags = ["-m", "cuda", "-n", str(workers), "-p", "check_plugin", "--tb=short", "--durations=8"]
        flags += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=120"]
        variables = os.environ | {"DMJD_TEST_DEVICE": device, "DMJD_CHECK": str(given)}
        status = subprocess.run([sys.executable, "-m", "pytest", *flags, *test_files()], cwd=ROOT, env=variables)
    record = Record("check", options.out)
    outcomes = Counter(entry["outcome"] for entry in record.entries.values() if entry["code"] == code)
    complete = status.returncode in (0, 5) and not outcomes["failed"]  # 5: every test passed earlier
    record.describe(complete=complete, outcomes=dict(outcomes))
    print(dict(outcomes))
    return 0 if complete else status.returncode or 1


if __name__ == "__main__":
    sys.exit(run(part_options(__doc__)))
