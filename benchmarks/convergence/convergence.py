"""Compare recipes in equal time (or epochs), over several seeds, each at its best base learning rate.

    python benchmarks/convergence/convergence.py main --encoder vit_lite --data cifar10 --minutes 8 --seeds 3 \
      --out runs/convergence

A tenth of the training images is held out: no encoder trains on them, and every choice is made on them. The phases
can be resumed:

- calibrate (with ``--clock calibrated``): seconds per step of each variant, the fastest of several alternating rounds.
  Runs then have as many steps as fit into the minutes, so other load on the machine changes no result. With ``--clock
  wall`` runs follow the engine's own clock, which excludes hooks and so the probes;
- search: the same candidate base learning rates for every variant, short runs, best linear probe;
- train: variants and seeds in shuffled order; kNN and linear probe at regular intervals;
- test: after all training, kNN and linear probe by the library's own protocol on the test set, once;
- report: JSON, a figure (.png) and a table (.md).

The set ``distill`` learns from a trained model: give it with ``--teacher``, and the size of the images with
``--img-size``; the report compares the teacher's own frozen features, too. The set ``adapt`` goes on from weights: give
them with ``--init``; the first probe of such a run is that of the weights as they were.

``name@share`` in ``--variants`` is a variant whose whole schedule takes that fraction of the time: ``dmjd@10/37``.
``--slice-minutes 8`` saves and stops after eight minutes; repeat the command to continue. ``--parallel 6`` trains six
runs at a time, for a GPU that one small model does not fill.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from convergence_jobs import Job, TimedSteps, do_in_processes, with_once
from convergence_models import make_model
from convergence_options import PHASES, parse
from convergence_probe import Measures, Probe, ProbeHook, split, teacher_scores, test_scores
from convergence_report import curves_figure, final_score, result_table, summarize
from convergence_sets import ENCODERS, base_name, shuffled, variants_of, with_share
from convergence_variant import Variant

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.resuming import resume_differences
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import load_encoder
from dmjd.engine.console import Console
from dmjd.engine.device import pick_device
from dmjd.engine.loop import NonFiniteLoss, Report, TrainState
from dmjd.figures.grid import save_figure
from dmjd.files import write_bytes, write_text
from dmjd.pretraining.bench import machine
from dmjd.runs.build import build_encoder, build_masks

SEARCH_SEED = 1000  # differs from the seeds of the runs
# Paths of one machine, and what a process of --parallel does: left out of the record.
PATHS = ("data", "held_out_data", "out", "json", "encoders", "teacher", "init", "job")
ROUNDS, TIMED_IMAGES = 3, 2048  # of the calibration
COMMON: dict[str, Any] = {
    "class_token": False,
    "crop_scale": (0.5, 1.0),
    "clip_grad": 3.0,
    "labels": "column",
    "eval_every": 0,
    "final_eval": False,
    "report": False,
    "checkpoint_every": 200,
    "held_out": 0,  # the study has its own held-out images
}


class Study:
    """The phases of a study; finished jobs are JSON files in ``out/jobs``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, Path(os.path.abspath(arguments.out))
        self.console, self.device, self.started = Console(), pick_device(arguments.device), time.monotonic()
        self.available = variants_of(arguments.set, arguments.encoder.startswith("conv"))
        self.trained = {name: with_share(name, self.available) for name in arguments.variants or self.available}
        self._check_parallel()
        for teacher in [v.teacher for v in self.trained.values() if v.teacher is not None]:
            self.trained.setdefault(teacher, self.available[teacher])
        self.baseline = arguments.baseline or next(iter(self.trained))
        if self.baseline not in self.trained:
            raise ValueError(f"the baseline {self.baseline} is not one of the variants: {', '.join(self.trained)}")
        self.jobs = self.out / "jobs"
        self.jobs.mkdir(parents=True, exist_ok=True)
        split(arguments.data, self.out / "data", arguments.held_out, arguments.held_out_data)
        self.num_images = len(open_source(str(self.out / "data"), split="train", labels="column"))
        self.features = "bf16" if arguments.precision == "bf16" else "fp32"
        self.common = COMMON | {"img_size": arguments.img_size}
        counts = (arguments.probe_train, arguments.probe_test)
        self.probe = Probe(self.out / "data", arguments.img_size, *counts, self.device, self.features)
        self._stop_sent = False  # to the current run
        self.seconds: dict[str, float] = {}  # per step, by variant, if calibrated
        self.best_blrs: dict[str, float] = {}

    def run(self) -> None:
        """The phases in order; variants with a teacher come after their teachers."""
        until = PHASES.index(self.arguments.until)
        if self.arguments.clock == "calibrated":
            self.calibrate()
        if self.arguments.job is not None:
            self.do(self.arguments.job)
            return
        runs = []
        for has_teacher in (False, True):
            wave = {name: v for name, v in self.trained.items() if (v.teacher is not None) == has_teacher}
            if until >= PHASES.index("search"):
                self.search(wave)
            if until >= PHASES.index("train"):
                runs += self.train(wave)
        if until >= PHASES.index("test") and not self.arguments.skip_test:
            self.test(runs)
        if until >= PHASES.index("report"):
            self.report(runs)

    def _check_parallel(self) -> None:
        dependent = [name for name, variant in self.trained.items() if variant.teacher is not None]
        if self.arguments.parallel > 1 and dependent:
            raise ValueError(f"--parallel does not fit variants that learn from another one: {', '.join(dependent)}")

    # ---- settings

    def config(self, name: str, variant: Variant, blr: float, seed: int, out: Path, share: float) -> PretrainConfig:
        """Configuration of a run of a variant over ``share`` of the study's time."""
        given, own = self.arguments, dict(variant.overrides)
        if variant.teacher is not None:
            own["teacher"] = str(self._teacher(variant.teacher))
        elif "teacher" in (own.get("target"), own.get("mim_target"), own.get("vis_target")):
            own["teacher"] = given.teacher
        if "init" in own:
            own["init"] = given.init
        config = dmjd.recipes.get_recipe(variant.recipe)(data=str(self.out / "data"), out=str(out), steps=1).replace(
            **self.common
            | ENCODERS[given.encoder]
            | {"batch_size": given.batch_size, "precision": given.precision, "device": given.device, "seed": seed}
            | given.override
            | own
        )
        masks = build_masks(config)
        rule = 1.0 if variant.scale_rule else masks.mask_ratio / masks.pred_ratio
        return config.replace(blr=blr * rule * variant.blr_factor, **self._duration(name, share * variant.share))

    def _duration(self, name: str, share: float) -> dict[str, float]:
        given = self.arguments
        if given.epochs is not None:
            return {"epochs": given.epochs * share}
        if given.clock == "wall":
            return {"minutes": given.minutes * share}
        return {"steps": max(1, round(60 * given.minutes * share / self.seconds.get(base_name(name), 1.0)))}

    def _teacher(self, name: str) -> Path:
        """The first run of the teacher; before it exists, an untrained encoder of its size, which takes as long."""
        blr = self.best_blrs.get(name)
        folder = self.out / "runs" / self._key("train", name, blr, 0, 1.0) if blr is not None else None
        if folder is not None and folder.exists():
            return folder
        stand_in = self.out / "stand_in.safetensors"
        if not stand_in.exists():
            encoder = build_encoder(
                PretrainConfig(**self.common | ENCODERS[self.arguments.encoder] | self.arguments.override)
            )
            encoder.preprocess = self.probe.preprocess
            write_bytes(stand_in, encoder_bytes(encoder))
        return stand_in

    def _key(self, kind: str, name: str, blr: float, seed: int, share: float) -> str:
        given = self.arguments
        length = f"{given.epochs:g}epochs" if given.epochs is not None else f"{given.minutes:g}min-{given.clock}"
        part = f"-of-{share:g}" if share != 1.0 else ""
        part += f"-once{given.once_share:g}" if given.once_share else ""
        return f"{kind}-{given.encoder}-{name.replace('/', '_')}-{length}{part}-blr{blr:g}-seed{seed}"

    # ---- phases

    def calibrate(self) -> None:
        """Seconds per step of each variant, the fastest of several alternating rounds; measured once and saved."""
        file = self.out / f"calibration-{self.arguments.encoder}.json"
        kept: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        needed = {base_name(n): v for n, v in (self.trained | self._searched(self.trained)).items()}
        missing = {name: variant for name, variant in needed.items() if name not in kept}
        if missing:
            steps = {name: self._timed_steps(name, variant) for name, variant in missing.items()}
            for _ in range(ROUNDS):
                for name in shuffled(list(missing)):
                    kept[name] = min(kept.get(name, float("inf")), steps[name]())
            write_text(file, json.dumps(kept, indent=2) + "\n")
            for name in missing:
                self.console.say(f"{name}: {1000 * kept[name]:.1f} ms per step")
        own = {name: variant.overrides for name, variant in (self.available | self.trained).items()}
        images = {name: own.get(name, {}).get("batch_size", self.arguments.batch_size) for name in kept}
        self.seconds = with_once(kept, self.baseline, self.arguments.once_share, images)

    def _timed_steps(self, name: str, variant: Variant) -> TimedSteps:
        config = self.config(name, variant, 1e-4, 0, self.out, 1.0).replace(steps=1)
        source = open_source(str(self.out / "data"), split="train", labels="column")
        source = SubsetSource(source, range(min(TIMED_IMAGES, len(source))))
        model = make_model(variant, config)
        model.encoder.preprocess = self.probe.preprocess
        return TimedSteps(config, model, source)

    def _searched(self, wave: dict[str, Variant]) -> dict[str, Variant]:
        """The variants whose base learning rate is needed."""
        names = {variant.blr_of or name for name, variant in wave.items()}
        return {name: self.trained.get(name) or self.available.get(name) or Variant(name) for name in sorted(names)}

    def search(self, wave: dict[str, Variant]) -> None:
        """Best base learning rate of each variant: equal candidates and time, best linear probe on held-out images."""
        blrs = self.arguments.blrs
        wanted = {name: variant for name, variant in self._searched(wave).items() if name not in self.best_blrs}
        scores: dict[str, dict[float, float]] = {name: {} for name in wanted}
        if len(blrs) > 1:
            jobs = shuffled([Job("search", name, blr, SEARCH_SEED) for name in wanted for blr in blrs])
            for job, record in zip(jobs, self.do_all(jobs), strict=True):
                scores[job.name][job.blr] = final_score(record)
        for name, tried in scores.items():
            self.best_blrs[name] = max(blrs, key=lambda blr: tried.get(blr, 0.0))
            if tried:
                listed = ", ".join(f"{blr:g}: {100 * tried[blr]:.1f}" for blr in sorted(tried))
                at_edge = len(blrs) > 2 and self.best_blrs[name] in (min(blrs), max(blrs))
                edge = " (at the edge of the candidates)" if at_edge else ""
                self.console.say(f"{name}: base learning rate {self.best_blrs[name]:g}{edge}; linear probe {listed}")

    def train(self, wave: dict[str, Variant]) -> list[dict[str, Any]]:
        """All runs of a wave, in shuffled order."""
        blrs = {name: self.best_blrs[variant.blr_of or name] for name, variant in wave.items()}
        jobs = [Job("train", name, blrs[name], seed) for name in wave for seed in range(self._seeds(name))]
        records = dict(zip(shuffled(jobs), self.do_all(shuffled(jobs)), strict=True))
        return [records[job] for job in jobs]

    def _seeds(self, name: str) -> int:
        given = self.arguments
        return given.seeds if given.repeat is None or name in given.repeat else 1

    def do_all(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """The records of jobs, in order; with ``--parallel`` several are done at a time, each by a process of its own.

        A job whose process failed is done again here, where its error ends the study.
        """
        if self.arguments.parallel > 1:
            do_in_processes([job for job in jobs if not self._file(job).exists()], self.arguments.parallel)
        return [self.do(job) for job in jobs]

    def do(self, job: Job) -> dict[str, Any]:
        """The record of a job."""
        return self._tested(job) if job.kind == "test" else self._trained(job)

    def _file(self, job: Job) -> Path:
        return self.jobs / f"{self._key(*job, self._share(job))}.json"

    def _share(self, job: Job) -> float:
        return self.arguments.search_share if job.kind == "search" else 1.0

    def _trained(self, job: Job) -> dict[str, Any]:
        """One run with its probes; a finished one is read from its file."""
        kind, name, blr, seed = job
        variant = self._searched({name: Variant(name)})[name] if kind == "search" else self.trained[name]
        share, probes = self._share(job), 1 if kind == "search" else self.arguments.probes
        key, shares = self._key(*job, share), [(i + 1) / probes for i in range(probes)]
        file, folder = self.jobs / f"{key}.json", self.out / "runs" / key
        config = self.config(name, variant, blr, seed, folder, share)
        if file.exists():
            record = json.loads(file.read_text())
            if lines := resume_differences(PretrainConfig.from_json(json.dumps(record["config"])), config):
                raise ValueError(f"{file} has other settings; give another --out:\n  " + "\n  ".join(lines))
            return record
        self._stop_if_due()
        self.console.say(f"--- {key}")
        model = make_model(variant, config)
        measures = Measures(self.out / "data", model, config, self.probe.preprocess, self.device)
        hook = ProbeHook(model.encoder, self.probe, shares, self.jobs / f"{key}.jsonl", measures)
        if kind == "train" and not hook.lines:
            model.to(self.device)
            hook.write(0.0, TrainState())
        diverged = False
        try:
            finished = dmjd.pretrain(
                config.replace(init=None, from_init=None), model=model, hooks=[hook, self._guard]
            ).finished
        except NonFiniteLoss as error:
            self.console.warn(str(error))
            finished = diverged = True
        if not finished:
            raise SystemExit(0)
        record = {"key": key, "variant": name, "seed": seed, "blr": blr, "diverged": diverged}
        record |= {"probes": [self._line(name, line) for line in hook.lines], "config": json.loads(config.to_json())}
        write_text(file, json.dumps(record, indent=2) + "\n")
        self._tidy(kind, folder)
        return record

    def _line(self, name: str, line: dict[str, float]) -> dict[str, float]:
        """A probe with its coordinates on the axes of the figures."""
        seconds = line["step"] * self.seconds[base_name(name)] if self.seconds else line["seconds"]
        values = {key: value for key, value in line.items() if key != "seconds"}
        return values | {"minutes": seconds / 60, "epochs": line["images"] / self.num_images}

    def _tidy(self, kind: str, folder: Path) -> None:
        """Delete the checkpoints of a finished run, and the whole folder of a search run."""
        shutil.rmtree(folder if kind == "search" else folder / "checkpoints")
        if kind == "train" and self.arguments.encoders is not None:
            self.arguments.encoders.mkdir(parents=True, exist_ok=True)
            half = load_encoder(folder).half()
            write_bytes(self.arguments.encoders / f"{folder.name}.safetensors", encoder_bytes(half))

    def _guard(self, report: Report) -> None:
        """Stop the run with one signal when the slice is over, as a user would; a second signal would kill it."""
        if self._over() and not self._stop_sent:
            self._stop_sent = True
            signal.raise_signal(signal.SIGTERM)

    def _over(self) -> bool:
        slice_minutes = self.arguments.slice_minutes
        return slice_minutes is not None and time.monotonic() - self.started > 60 * slice_minutes

    def _stop_if_due(self) -> None:
        if self._over():
            self.console.say("the slice is over; repeat the command to continue")
            raise SystemExit(0)

    def test(self, runs: list[dict[str, Any]]) -> None:
        """Evaluate each run once on the test set, after everything is chosen and trained."""
        finished = [run for run in runs if not run["diverged"]]
        jobs = [Job("test", run["variant"], run["blr"], run["seed"]) for run in finished]
        for run, record in zip(finished, self.do_all(jobs), strict=True):
            run["test"] = record

    def _tested(self, job: Job) -> dict[str, Any]:
        """kNN and linear probe of a run on the test set."""
        file = self._file(job)
        if not file.exists():
            self._stop_if_due()
            folder = self.out / "runs" / self._key("train", *job[1:], 1.0)
            kept = test_scores(folder, self.arguments, self.out / "test", self.features)
            write_text(file, json.dumps(kept, indent=2) + "\n")
        return json.loads(file.read_text())

    def _teacher_scores(self) -> dict[str, Any] | None:
        """Scores of the frozen teacher's own features on the held-out images, measured once and saved."""
        if self.arguments.teacher is None:
            return None
        file = self.jobs / "teacher.json"
        if not file.exists():
            write_text(file, json.dumps(teacher_scores(self.arguments.teacher, self.probe), indent=2) + "\n")
        return json.loads(file.read_text())

    def report(self, runs: list[dict[str, Any]]) -> None:
        """Write JSON, figure and table; print the table."""
        given = self.arguments
        rows = summarize(runs, self.baseline)
        searches = [json.loads(file.read_text()) for file in sorted(self.jobs.glob(f"search-{given.encoder}-*.json"))]
        own = {k: Path(v).name if k in PATHS else v for k, v in given.override.items()}
        settings = {k: v for k, v in vars(given).items() if k not in PATHS}
        content = {
            "set": given.set,
            "settings": settings | {"override": own, "data": Path(given.data).name},
            "baseline": self.baseline,
            "summary": rows,
            "seconds_per_step": self.seconds,
            "teacher": self._teacher_scores(),
            "search": [{"variant": s["variant"], "blr": s["blr"], "linear": final_score(s)} for s in searches],
            "runs": [{key: value for key, value in run.items() if key != "config"} for run in runs],
            "machine": machine(self.device),
            "versions": {"dmjd": dmjd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        length = f"{given.epochs:g}epochs" if given.epochs is not None else f"{given.minutes:g}min"
        file = given.json or Path(f"benchmarks/results/convergence_{given.set}_{given.encoder}_{length}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, indent=1) + "\n")
        save_figure(curves_figure(runs, f"{given.set}, {given.encoder}, {length}"), file.with_suffix(".png"))
        table = result_table(rows, self.baseline)
        write_text(file.with_suffix(".md"), table)
        print(table)
        self.console.say(f"wrote {file}, the figure (.png) and the table (.md)")


def main() -> None:
    """Run the study."""
    try:
        Study(parse(__doc__)).run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
