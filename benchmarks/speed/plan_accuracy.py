"""How well ``dmjd plan`` predicts: its command is run, and steps, time and memory are compared with the plan.

    python benchmarks/speed/plan_accuracy.py --data grocery cifar10 --hours 0.1 --teacher local-dir:FOLDER

For each set a plan of new weights, and with ``--teacher`` one of the recipe ``distill`` for the first set. Every run is
a process of its own.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import dmjd
from dmjd.pretraining.bench import machine
from dmjd.runs.metrics import read_metrics


def compare(data: str, hours: float, teacher: str | None) -> dict[str, Any]:
    """Plan, run and compare."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        file = Path(folder) / "plan.json"
        own = ["--teacher", teacher] if teacher is not None else []
        asked = ["--data", data, "--hours", str(hours), "--out", str(out), "--json", str(file), *own]
        subprocess.run([sys.executable, "-m", "dmjd", "plan", *asked], check=True)
        plan = json.loads(file.read_text())
        started = time.monotonic()
        memory = peak_memory([sys.executable, "-m", *shlex.split(plan["command"])])
        minutes = (time.monotonic() - started) / 60
        last = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line][-1]
        disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e9
    real = {"steps": last["step"], "epochs": last["epoch"], "minutes": minutes, "memory_gb": memory, "disk_gb": disk}
    return {
        "data": Path(data).name,
        "teacher": teacher is not None,
        "command": _without_paths(plan["command"], {data: Path(data).name, str(out): "runs/mine"}, teacher),
        "plan": plan["expected"],
        "real": real,
        "relative": {name: plan["expected"][name] / value - 1 for name, value in real.items()},
    }


def _without_paths(command: str, names: dict[str, str], teacher: str | None) -> str:
    """The command as it is recorded: paths of this machine become names."""
    if teacher is not None:
        names = names | {teacher: teacher.split("/")[-1]}
    for path, name in names.items():
        command = command.replace(path, name)
    return command


def peak_memory(command: list[str]) -> float:
    """Run a command; its peak memory in GB."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e9


def table(rows: list[dict[str, Any]]) -> str:
    """Plan and run side by side, with the relative error of the plan."""
    names = list(rows[0]["real"])
    lines = [f"| data | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['plan'][n]:.4g} / {row['real'][n]:.4g} ({row['relative'][n]:+.0%})" for n in names]
        lines.append(f"| {row['data']}{', teacher' * row['teacher']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--hours", type=float, default=0.1)
    parser.add_argument("--teacher")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/plan.json"))
    given = parser.parse_args()
    settings = [(data, None) for data in given.data] + ([(given.data[0], given.teacher)] if given.teacher else [])
    rows = [compare(data, given.hours, teacher) for data, teacher in settings]
    found = {"hours": given.hours, "rows": rows, "machine": machine(torch.device("cpu")), "version": dmjd.__version__}
    given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))
