"""Compile the cases of the speed part beforehand, several at once, into the cache that all parts share.

    python3 benchmarks/gpu/warm.py --seconds 200 --out OUT --pack PACK

Compilation takes a minute per case, nearly all of it on one core of the host, so this runs beside the check. Without
it the speed part measures the same, later. ``--case NAME`` takes one step of one case.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from options import Options, part_options
from part_speed import Speed
from sides import Side, layers_of
from small import run_steps, small_engine, small_loader, with_batch
from speed_cases import EAGER, Case, cases, compiling

# How many at a time: activations of the large models stay in memory while their backward pass is compiled.
LARGE, SMALL = 3, 3


def take_step(case: Case, options: Options) -> None:
    """One step of a case, which compiles it."""
    assert case.batch is not None
    with layers_of(case.layers), compiling(case.mode, options.toy):
        if not case.is_small:
            Side(case.comparison, case.kind, options.device, options.toy, compiled=True).step(case.batch)
            return
        loader = small_loader(options.pack, options.device, options.toy, images=2 * case.batch)
        engine = small_engine(case.comparison, case.batch, True, options.device, options.toy)
        run_steps(engine, with_batch(loader, case.batch).batches(), 1)


def start(case: Case, until: float) -> None:
    """Compile a case in a process of its own, which ends when time is up."""
    started = time.monotonic()
    if started >= until:
        return
    command = [sys.executable, *sys.argv, "--case", case.name]
    try:
        done = subprocess.run(command, timeout=until - started, capture_output=True, text=True)
        ended = "compiled" if done.returncode == 0 else f"failed: {done.stderr[-400:]}"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    print(f"[warm] {case.name}: {ended} after {time.monotonic() - started:.0f} s", flush=True)


def main(options: Options) -> None:
    """Compile the one case given, or all that are not measured yet."""
    if options.case is not None:
        take_step(next(case for case in cases(options.toy) if case.name == options.case), options)
        return
    until, seen = time.monotonic() + options.seconds, set()
    with ThreadPoolExecutor(LARGE) as large, ThreadPoolExecutor(SMALL) as small:
        for case in Speed(options).waiting():
            same = (case.comparison, case.is_small, case.kind if not case.is_small else "", case.layers, case.mode)
            if case.mode != EAGER and same not in seen:
                seen.add(same)
                (small if case.is_small else large).submit(start, case, until)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(part_options(__doc__))
