"""Disk size and import time of each dependency, as a Markdown table.

python benchmarks/dependencies.py

"with its own" adds the packages that only this dependency requires. "fraction" is relative to everything that
``pip install dmjd`` installs. Import times are processor time, the best of two processes; "after torch" is the time in
a process that has already imported torch.
"""

import importlib.metadata as metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache

IMPORTS = {"scikit-learn": "sklearn", "pillow": "PIL", "tensorboard": "torch.utils.tensorboard"}


def plain(name: str) -> str:
    """Normalized name of a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def requirements(name: str) -> tuple[str, ...]:
    """Installed distributions that this one requires, without its extras."""
    try:
        given = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return ()
    names = (plain(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in given if "extra ==" not in text)
    return tuple(n for n in names if size(n) > 0)


@cache
def size(name: str) -> float:
    """MB of a distribution's own files."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return 0.0
    paths = [f.locate() for f in files]
    return sum(p.stat().st_size for p in paths if p.is_file()) / 1e6


def closure(roots: Iterable[str], without: str = "") -> set[str]:
    """The distributions and everything they require, except one and what only that one requires."""
    found = {without}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += requirements(name)
    return found - {without}


def seconds(code: str) -> float:
    """Processor time of a statement, the best of two fresh processes."""
    text = f"import time; start = time.process_time(); {code}; print(time.process_time() - start)"
    return min(float(subprocess.check_output([sys.executable, "-c", text]).split()[-1]) for _ in range(2))


def after_torch(module: str) -> float:
    """The same for an import in a process that has imported torch."""
    text = f"import torch, time; start = time.process_time(); import {module}; print(time.process_time() - start)"
    return min(float(subprocess.check_output([sys.executable, "-c", text]).split()[-1]) for _ in range(2))


def main() -> None:
    direct = requirements("dmjd")
    total = closure(direct)
    whole = sum(map(size, total))
    print(f"{len(total)} distributions, {whole:,.0f} MB\n")
    print("| dependency | MB | with its own | fraction | import s | after torch |\n|---|---|---|---|---|---|")
    for name in direct:
        own = total - closure(direct, without=name)
        weight = sum(map(size, own))
        module = IMPORTS.get(name, name.replace("-", "_"))
        times = f"{seconds(f'import {module}'):.2f} | {after_torch(module):.2f}"
        print(f"| {name} | {size(name):,.1f} | {weight:,.1f} | {weight / whole:.1%} | {times} |")


if __name__ == "__main__":
    main()
