"""Speed: floors first, then steps of each side, eager before compiled, then 32-pixel images in memory.

The order is that of importance, because time may run out at any case. A case is measured once per card: cases of
earlier visits on the same kind of card are kept. A case that crashed or hung is tried once more by the next visit.
"""

import gc
import re
import statistics
import time
from typing import Any

import torch
from floors import card_rates, step_floors
from options import Options, part_options
from record import Clock, Record, versions
from sides import Side, layers_of
from small import measure_small, profile_small, small_loader
from speed_cases import EAGER, Case, cases, compiling

from dmjd.pretraining.bench import machine, wait

WARMUP, STEPS, ROUNDS = 3, 4, 3

COMPILE_SECONDS = 40  # expected, until one was measured; ``warm.py`` compiles beforehand


class Speed:
    """Runs the cases that are not measured yet.

    Args:
        options: of the command line.
    """

    def __init__(self, options: Options) -> None:
        self.device, self.toy, self.pack = options.device, options.toy, options.pack
        self.clock, self.record = Clock(options.seconds), Record("speed", options.out)
        self._compile_seconds = 5.0 if self.toy else float(COMPILE_SECONDS)
        self._loader: Any = None
        where = machine(self.device)
        self.card = f"{where['gpu'] or where['cpu']}{', toy' if self.toy else ''}"

    def run(self) -> None:
        """All cases, until time is up."""
        self.record.describe(machine=machine(self.device), versions=versions(), complete=False)
        key = f"{self.card} | rates"
        if key not in self.record.entries:
            self.record.put(key, card_rates(self.device))
        self.rates = self.record.entries[key]
        for name, value in self.rates.items():
            print(f"{name}: {value / 1e12:.3g} T/s", flush=True)
        skipped = False
        for case in self.waiting():
            if self.clock.left < (self._compile_seconds * 1.3 if case.mode != EAGER else 12 if case.batch else 40):
                skipped = True  # a shorter case may still fit
                continue
            self._run_case(case)
        self.record.describe(complete=not skipped)

    def waiting(self) -> list[Case]:
        """The cases that are not measured yet."""
        return [case for case in cases(self.toy) if not self._is_done(case)]

    def _key(self, case: Case) -> str:
        return f"{self.card} | {case.name}"

    def _is_done(self, case: Case) -> bool:
        entry = self.record.entries.get(self._key(case))
        return entry is not None and ("running" not in entry or entry["running"] > 1)

    def _run_case(self, case: Case) -> None:
        """Measure a case; an error becomes its result."""
        key = self._key(case)
        tries = self.record.entries.get(key, {}).get("running", 0)
        self.record.put(key, {"running": tries + 1})  # stays if the process dies
        started = time.monotonic()
        try:
            with layers_of(case.layers), compiling(case.mode, self.toy):
                result = self._measure(case)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:600]}
        result["seconds"] = round(time.monotonic() - started, 1)
        if case.mode != EAGER and "compile_s" in result:
            self._compile_seconds = max(5.0 if self.toy else 20.0, result["seconds"])
        self.record.put(key, result)
        shown = {k: v for k, v in result.items() if k in ("images_per_s", "mfu", "memory_gb", "error", "compile_s")}
        print(f"{case.name}: {shown}", flush=True)
        self._clear()

    def _measure(self, case: Case) -> dict[str, Any]:
        compiled = case.mode != EAGER
        if case.is_small:
            assert case.batch is not None
            if self._loader is None:
                self._loader = small_loader(self.pack, self.device, self.toy)
            function = measure_small if case.kind == "small" else profile_small
            result = function(case.comparison, self._loader, case.batch, compiled, self.device, self.toy)
            return self._judged(result, result.pop("model"), case.batch)
        side = Side(case.comparison, case.kind, self.device, self.toy, compiled)
        if case.batch is None:
            return self._largest(side)
        return self._judged(self._steps(side, case.batch), side.model, case.batch)

    def _steps(self, side: Side, batch: int) -> dict[str, Any]:
        """Median over rounds of the time of a step, after warm-up; the first step includes compilation."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        loss = float(side.step(batch))
        first = time.perf_counter() - started
        for _ in range(WARMUP - 1):
            side.step(batch)
        steps, rounds = 1 if self.toy else STEPS, []
        for _ in range(ROUNDS):  # without waiting for the device between the steps of a round
            wait(self.device)
            started = time.perf_counter()
            for _ in range(steps):
                side.step(batch)
            wait(self.device)
            rounds.append((time.perf_counter() - started) / steps)
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else None
        step = statistics.median(rounds)
        return {
            "images_per_s": batch / step,
            "step_ms": [round(1e3 * s, 3) for s in rounds],
            "memory_gb": memory,
            "compile_s": first - step,
            "loss": loss,
            "batch": batch,
        }

    def _judged(self, result: dict[str, Any], model: Any, batch: int) -> dict[str, Any]:
        """Add the floors of the step and the share of them that is reached."""
        floors = step_floors(model, batch, self.rates)
        milliseconds = 1e3 * batch / result["images_per_s"]
        reached = max(floors["arithmetic_ms"], floors["memory_ms"]) / milliseconds
        mfu = result["images_per_s"] * floors["gflop"] / batch * 1e9 / self.rates["matmul_bf16"]
        return result | {"mfu": mfu, "floors": floors, "share_of_floor": reached}

    def _largest(self, side: Side) -> dict[str, Any]:
        """Double the batch until it does not fit; the rates on the way, and the last result that fits."""
        rates, result, batch = {}, {}, 2 if self.toy else 128
        while batch <= (4 if self.toy else 8192):
            try:
                result = self._judged(self._steps(side, batch), side.model, batch)
            except RuntimeError as error:  # torch's own, or cuBLAS without room for its workspace
                if not rates or not re.search("memory|ALLOC", str(error)):
                    raise
                break
            rates[str(batch)] = result["images_per_s"]
            batch *= 2
        side.forget()
        return result | {"images_per_s_by_batch": rates}

    def _clear(self) -> None:
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    Speed(part_options(__doc__)).run()
