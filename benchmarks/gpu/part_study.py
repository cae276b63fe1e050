"""Study: ViT-tiny with 4-pixel tokens on CIFAR-10, 200 epochs of each variant in slices, then fine-tuning.

Images are those of the packed parquet file, JPEG-coded. An unfinished variant leaves its state in half precision (12
MB), which the next visit continues; a finished one leaves its encoder, and its classifier once it is fine-tuned.
``finish.py`` measures linear probe, kNN and fine-tuning on the test images, which are not here.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import Options, part_options
from record import RESULTS, Clock, Record, versions
from study_plan import (
    BATCH,
    FINETUNE_EPOCHS,
    SCRATCH,
    VARIANTS,
    classifier_file,
    config_of,
    encoder_file,
    restore_state,
    save_state,
    state_file,
    write_half,
)

import dmjd
from dmjd.config.finetune import FinetuneConfig
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.data.workers import available_cores
from dmjd.encoders.base import Encoder
from dmjd.encoders.classifier import CLASSIFIER_FILE
from dmjd.encoders.weights import ENCODER_FILE, load_encoder
from dmjd.engine.loop import Hook, Report
from dmjd.evaluation.setup import aligned_labels
from dmjd.evaluation.supervised.finetune import Finetuning
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.bench import machine
from dmjd.runs.build import build_encoder

MAX_FILES = 3  # of weights per visit, besides at most four JSON files and the log

TOY_STEPS = 10  # of a slice, so that the first visit ends within a variant

SPARE = 20  # seconds to save and to end


class Study:
    """Continues the first variant that is not finished, then the next, until time is up.

    Args:
        options: of the command line.
        work: folder for runs, which stays here.
    """

    def __init__(self, options: Options, work: Path) -> None:
        self.options, self.work, self.out = options, work, options.out
        self.clock, self.record = Clock(options.seconds), Record("study", options.out)
        self.record.describe(machine=machine(options.device), versions=versions(), complete=False)
        self.data = work / "cifar10" / "train.parquet"
        self.data.parent.mkdir(parents=True)
        self._write_images()
        self.files = 0

    def _write_images(self) -> None:
        """The packed images; the first 128 of them if ``toy``."""
        source = self.options.pack / "cifar10" / "train.parquet"
        if not self.options.toy:
            shutil.copy(source, self.data)
            return
        import pyarrow.parquet as pq

        pq.write_table(pq.read_table(source).slice(0, 128), self.data)

    def run(self) -> None:
        """Pre-train, then fine-tune, variant by variant; random weights last. An error ends its variant only."""
        for variant in [*VARIANTS, SCRATCH]:
            if "error" in self.entry(variant):
                continue
            try:
                finished = self._may_start() and self.pretrain(variant)
                if finished and self._may_start():
                    self.finetune(variant)  # in one piece; without time for it, the next variant takes what is left
            except dmjd.evaluation.Stopped:
                return
            except Exception as error:
                self.update(variant, error=f"{type(error).__name__}: {error}"[:1000])
                continue
            if not finished:
                return
        self.record.describe(complete=all("finetuned" in self.entry(v) for v in [*VARIANTS, SCRATCH]))

    def _may_start(self) -> bool:
        """Whether there is time, and room among the files that come back."""
        return self.clock.left > SPARE and self.files < MAX_FILES

    def entry(self, variant: str) -> dict[str, Any]:
        """What is known of a variant."""
        return dict(self.record.entries.get(variant, {}))

    def update(self, variant: str, **values: Any) -> None:
        """Add to what is known of a variant."""
        self.record.put(variant, self.entry(variant) | values)

    def traveled(self, name: str) -> Path:
        """A file of this visit, or of earlier ones."""
        return self.out / name if (self.out / name).exists() else RESULTS / name

    def pretrain(self, variant: str) -> bool:
        """Train a variant to its end or until time is up; returns whether it is finished."""
        if variant == SCRATCH or self.entry(variant).get("pretrained"):
            return True
        started, run, earlier = time.monotonic(), self.work / variant, self.entry(variant)
        compiled = earlier.get(
            "compile", self.options.device.type == "cuda" and compile_pays(self.traveled("speed.json"))
        )
        config = config_of(variant, self.data, run, self.options.toy, compile=compiled, device=self.options.device.type)
        state, first = self.traveled(state_file(self.out, variant).name), 0
        if state.exists() and earlier:
            first = restore_state(state, config, run)
        result = dmjd.pretrain(config, hooks=[self.stop_in_time(first)])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = earlier.get("curve", []) + [[line["step"], round(line["loss"], 5)] for line in lines if "loss" in line]
        visit = {
            "steps": [first, result.step],
            "seconds": round(time.monotonic() - started, 1),
            "images_per_s": lines[-1]["images_per_s"],
        }
        self.files += 1
        state_file(self.out, variant).unlink(missing_ok=True)
        if result.finished:
            write_half(run / ENCODER_FILE, encoder_file(self.out, variant))
        else:
            save_state(max((run / "checkpoints").glob("step-*.safetensors")), state_file(self.out, variant))
        self.update(
            variant,
            compile=compiled,
            pretrained=result.finished,
            step=result.step,
            epochs=lines[-1]["epoch"],
            configuration=json.loads(config.replace(data="cifar10", out=variant).to_json()),
            slices=[*earlier.get("slices", []), visit],
            curve=curve,
        )
        return result.finished

    def stop_in_time(self, first: int) -> Hook:
        """A hook that requests a stop as a user would, by a signal, after which everything is saved."""
        asked: list[int] = []

        def stop(report: Report) -> None:
            enough = self.options.toy and report.state.step >= first + TOY_STEPS
            if (enough or self.clock.left < SPARE) and report.progress < 1.0 and not asked:
                asked.append(report.state.step)  # a second signal would end the process
                os.kill(os.getpid(), signal.SIGTERM)

        return stop

    def finetune(self, variant: str) -> None:
        """Fine-tune the encoder of a variant, if it is not done and there is time for all of it."""
        if self.entry(variant).get("finetuned"):
            return
        toy = self.options.toy
        if self.clock.left < (SPARE if toy else self._finetune_seconds() * 1.15 + SPARE):
            return
        started, source = time.monotonic(), open_source(str(self.data), labels="column")
        few = SubsetSource(source, np.arange(64))  # the test images are not here; these only fill their place
        settings = {"epochs": 1, "batch_size": 16} if toy else {"epochs": FINETUNE_EPOCHS, "batch_size": BATCH}
        decay = {"layer_decay": 1.0} if variant == SCRATCH else {}  # it assumes that the early layers are trained
        task = Finetuning(
            FinetuneConfig(eval_every=0.0, **settings, **decay),
            self.start_of(variant),
            source,
            few,
            aligned_labels(source, few),
            device=self.options.device.type,
            precision="bf16",
            num_workers=available_cores(),
            seed=0,
        )
        result = task.run("result", self.work / variant)
        folder = self.work / variant / result["folder"]
        write_half(folder / CLASSIFIER_FILE, classifier_file(self.out, variant))
        self.files += 1
        seconds = round(time.monotonic() - started, 1)
        self.update(variant, finetuned=True, finetune_seconds=seconds, finetune_configuration=result["configuration"])

    def start_of(self, variant: str) -> Encoder:
        """The encoder to fine-tune: pre-trained, or with random weights."""
        if variant != SCRATCH:
            return load_encoder(self.traveled(encoder_file(self.out, variant).name))
        config = config_of("dmjd", self.data, self.work, self.options.toy)
        torch.manual_seed(1)
        encoder = build_encoder(config)
        encoder.preprocess = Preprocess(config.size)
        return encoder

    def _finetune_seconds(self) -> float:
        """Expected time of a fine-tuning: measured before, or guessed."""
        known = [e["finetune_seconds"] for e in self.record.entries.values() if "finetune_seconds" in e]
        return max(known, default=240.0)


def compile_pays(file: Path) -> bool:
    """Whether the speed part found compiled steps faster by more than a tenth on 32-pixel images."""
    if not file.exists():
        return False
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    found = {
        mode: [e["images_per_s"] for name, e in entries.items() if f"dmjd | small | recompute | {mode} | 512" in name]
        for mode in ("eager", "compiled")
    }
    return bool(found["eager"] and found["compiled"]) and max(found["compiled"]) > 1.1 * max(found["eager"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Study(part_options(__doc__), Path(folder)).run()
