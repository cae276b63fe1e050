"""Accuracy of other libraries' pre-training in equal time, on the same images and with an encoder of the same size.

    OMP_NUM_THREADS=1 python benchmarks/convergence/peers_study.py --data cifar10 --minutes 6 --seeds 3 \
      --blrs 1.5e-3 6e-3 1.6e-2 --json benchmarks/results/peers_6min.json

needs ``pip install -r benchmarks/requirements.txt``. Each side trains with its own model code, image transforms and
loss, in the loop of its documentation: a PyTorch ``DataLoader``, AdamW, warm-up and cosine. Ours are the recipe ``mae``
and HOG with colors with the settings that ``folder`` has for small images, in batches of 32 images; all others have 64.
Encoders have 5 blocks of width 128 and patches of 4 pixels.

A tenth of the training images is held out, as in ``convergence.py``: the best of the base learning rates is chosen on
it in runs of a quarter of the length, and if it is the highest or lowest, one three times as high or low is tried, too.
All sides get as many steps as fit into the minutes; the time of a step, with loading, is the shortest of several
alternating rounds, so run this part on an idle machine (``--until calibrate``).
The same probe reads the mean patch token of every encoder, layer-normalized. SimCLR trains exactly this mean; its
transform is lightly's without blur, for small images. Each run has a process of its own, whose largest memory is
recorded. Finished runs stay.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from convergence_color_sets import COLOR
from convergence_jobs import TIMED_STEPS, WARMUP_STEPS, TimedSteps
from convergence_models import make_model
from convergence_probe import Probe, split
from convergence_report import mean_and_std
from convergence_sets import ENCODERS, shuffled
from convergence_variant import Variant
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dmjd
from dmjd.data.sources.registry import open_source
from dmjd.data.sources.subset import SubsetSource
from dmjd.engine.device import keep_freed_memory
from dmjd.engine.loop import NonFiniteLoss
from dmjd.files import write_text
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.bench import machine

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 4, 128, 5, 4
BATCH, ROUNDS, TIMED_IMAGES, SEARCH_SEED, WARMUP = 64, 3, 2048, 1000, 0.1
OURS = {"dmjd, mae": Variant("mae"), "dmjd, settings of folder": Variant("dmjd", COLOR)}

Extract = Callable[[Tensor], Tensor]  # images [B, C, H, W] on the 0..255 scale -> features [B, D]


class Images(Dataset[Any]):
    """The training images in main memory, as Pillow images through a transform, as torchvision's CIFAR10 has them."""

    def __init__(self, data: Path, transform: Callable[[Image.Image], Any]) -> None:
        source = open_source(str(data), split="train", labels="column")
        self.arrays = [np.asarray(source.read(row)) for row in range(len(source))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.arrays[index]))


def tokens_mean(tokens: Tensor) -> Tensor:
    """Patch tokens [B, N, D] -> [B, D], as our encoders pool."""
    return F.layer_norm(tokens.float().mean(dim=1), tokens.shape[2:])


class HuggingFaceMae(nn.Module):
    """ViTMAEForPreTraining of transformers."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision import transforms
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
        sizes |= {"intermediate_size": 4 * WIDTH, "image_size": SIDE, "patch_size": PATCH}
        decoder = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        decoder |= {"decoder_intermediate_size": 256}
        self.model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, mask_ratio=0.75, **sizes, **decoder))
        embeddings = self.model.vit.embeddings
        if not embeddings.position_embeddings.any():
            # Without weights to load, transformers 5.24 sets the positions to zero. Such a model learns very little.
            embeddings.patch_embeddings.projection._is_hf_initialized = False
            embeddings.initialize_weights()
            self.model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
        own = Preprocess((SIDE, SIDE))
        crop = transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(own.mean, own.std)])

    def forward(self, batch: Tensor) -> Tensor:
        """Normalized images -> loss."""
        return self.model(batch).loss

    def features(self, images: Tensor) -> Tensor:
        """Normalized images -> [B, D], of all patches."""
        self.model.config.mask_ratio = 0.0
        tokens = self.model.vit(images).last_hidden_state[:, 1:]
        self.model.config.mask_ratio = 0.75
        return tokens_mean(tokens)


def small_vit(**own: Any) -> Any:
    """timm's vision transformer in the size of the study."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return VisionTransformer(num_classes=0, **sizes | own)


class LightlyMae(nn.Module):
    """MAE from lightly's building blocks, as in its documentation."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from lightly.transforms import MAETransform

        vit = small_vit()
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=PATCH,
            embed_dim=WIDTH,
            decoder_embed_dim=64,
            decoder_depth=1,
            decoder_num_heads=2,
        )
        views = MAETransform(input_size=SIDE)
        self.transform = lambda image: views(image)[0]

    def forward(self, batch: Tensor) -> Tensor:
        """Normalized images -> loss."""
        from lightly.models import utils

        B, length = len(batch), self.backbone.sequence_length
        keep, masked = utils.random_token_mask(size=(B, length), mask_ratio=0.75, device=batch.device)
        encoded = self.decoder.embed(self.backbone.encode(images=batch, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (B, length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.normalize_mean_var(utils.get_at_index(utils.patchify(batch, PATCH), masked - 1), dim=-1)
        return F.mse_loss(predicted.float(), target)

    def features(self, images: Tensor) -> Tensor:
        """Normalized images -> [B, D]."""
        return tokens_mean(self.backbone.encode(images=images)[:, 1:])


class LightlySimclr(nn.Module):
    """SimCLR from lightly's building blocks, with its transform for small images, on a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        vit = small_vit(class_token=False, global_pool="avg")
        self.backbone, self.head = vit, SimCLRProjectionHead(WIDTH, WIDTH, WIDTH)
        self.loss = NTXentLoss()
        self.transform = SimCLRTransform(input_size=SIDE, gaussian_blur=0.0, min_scale=0.2)

    def forward(self, batch: list[Tensor]) -> Tensor:
        """Two normalized views -> loss."""
        first, second = self.head(self.backbone(torch.cat(batch))).float().chunk(2)
        return self.loss(first, second)

    def features(self, images: Tensor) -> Tensor:
        """Normalized images -> [B, D]."""
        return tokens_mean(self.backbone.forward_features(images))


PEERS: dict[str, Callable[[], nn.Module]] = {
    "transformers, ViTMAE": HuggingFaceMae,
    "lightly, MAE": LightlyMae,
    "lightly, SimCLR": LightlySimclr,
}


class Peer:
    """Trains a peer in a plain loop."""

    def __init__(self, name: str, images: Images, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = PEERS[name]()
        images.transform = self.model.transform
        self._batches = self._endless(DataLoader(images, BATCH, shuffle=True, drop_last=True))
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))

    def _endless(self, loader: DataLoader[Any]) -> Iterator[Any]:
        while True:
            yield from loader

    def steps(self, count: int, blr: float) -> None:
        """Train for a whole schedule of ``count`` steps."""
        warmup = max(1, round(WARMUP * count))
        for step in range(count):
            cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, count - warmup)))
            for group in self._optimizer.param_groups:
                group["lr"] = blr * BATCH / 256 * min(1.0, step / warmup) * cosine
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(next(self._batches))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def extract(self, preprocess: Preprocess) -> Extract:
        """The frozen features."""
        self.model.eval()

        @torch.no_grad()
        def features(raw: Tensor) -> Tensor:
            return self.model.features(preprocess.normalize(raw))  # type: ignore[operator]

        return features


def peak_memory_gib() -> float:
    """Largest memory of this process since it began (``ru_maxrss`` would count that of its parent, too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


class Study:
    """Calibration, search and runs; each result is a JSON file in ``out/jobs``."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.data, self.jobs = given, given.out / "data", given.out / "jobs"
        self.jobs.mkdir(parents=True, exist_ok=True)
        split(given.data, self.data, 0.1)
        self.probe = Probe(self.data, SIDE, 5000, 2500, torch.device("cpu"), "fp32")
        self.images = Images(self.data, lambda image: image)
        self.seconds = self._calibrated()

    def _calibrated(self) -> dict[str, float]:
        """Seconds per step of each side."""
        file = self.given.out / "calibration.json"
        if not file.exists():
            shortest: dict[str, float] = {}
            for _ in range(ROUNDS):
                for name in shuffled([*PEERS, *OURS]):
                    shortest[name] = min(shortest.get(name, math.inf), self._step_time(name))
            write_text(file, json.dumps(shortest, indent=1) + "\n")
        return json.loads(file.read_text())

    def _step_time(self, name: str) -> float:
        if name in OURS:
            config = self._config(name, 1, 1e-4, 0, self.given.out)
            source = open_source(str(self.data), split="train", labels="column")
            model = make_model(OURS[name], config)
            model.encoder.preprocess = self.probe.preprocess
            return TimedSteps(config, model, SubsetSource(source, range(TIMED_IMAGES)))()
        peer = Peer(name, self.images, 0)
        peer.steps(WARMUP_STEPS, 1e-4)
        started = time.perf_counter()
        peer.steps(TIMED_STEPS, 1e-4)
        return (time.perf_counter() - started) / TIMED_STEPS

    def _config(self, name: str, steps: int, blr: float, seed: int, out: Path) -> Any:
        variant = OURS[name]
        config = dmjd.recipes.get_recipe(variant.recipe)(data=str(self.data), out=str(out), steps=steps)
        common = {"img_size": SIDE, "batch_size": BATCH, "precision": "bf16", "blr": blr, "seed": seed, "held_out": 0}
        common |= {"labels": "column", "eval_every": 0, "final_eval": False, "report": False, "clip_grad": 3.0}
        return config.replace(**common | ENCODERS["vit_lite"] | variant.overrides)

    def batch_size(self, name: str) -> int:
        """Images per step of a side."""
        return OURS[name].overrides.get("batch_size", BATCH) if name in OURS else BATCH

    def score(self, name: str, share: float, blr: float, seed: int) -> dict[str, float]:
        """Probes of a run, trained now or before."""
        steps = max(1, round(60 * self.given.minutes * share / self.seconds[name]))
        file = self.jobs / f"{name.replace(', ', '-').replace(' ', '_')}-{steps}-blr{blr:g}-seed{seed}.json"
        if not file.exists():
            print(f"{name}: {steps} steps, blr {blr:g}, seed {seed}", flush=True)
            if name in OURS:
                config = self._config(name, steps, blr, seed, self.given.out / "runs" / file.stem)
                model = make_model(OURS[name], config)
                try:
                    dmjd.pretrain(config, model=model)
                    found = self.probe(model.encoder)
                except NonFiniteLoss:  # a rate that is too high
                    found = dict.fromkeys(("knn", "linear"), 0.0)
            else:
                peer = Peer(name, self.images, seed)
                peer.steps(steps, blr)
                found = self.probe.scores(peer.extract(self.probe.preprocess))
            memory = peak_memory_gib()
            write_text(file, json.dumps(found | {"steps": steps, "memory_gib": memory}) + "\n")
        return json.loads(file.read_text())

    def alone(self, *job: Any) -> dict[str, float]:
        """:meth:`score` in a process of its own, which shows how much memory the run needs."""
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_score, self.given, job).result()

    def _search(self, name: str) -> dict[float, float]:
        """Base learning rate -> linear probe after a quarter of the length; one more if the best is at an edge."""
        tried = {blr: self.alone(name, 0.25, blr, SEARCH_SEED)["linear"] for blr in sorted(self.given.blrs)}
        best = max(tried, key=lambda blr: tried[blr])
        if len(tried) > 1 and best in (min(tried), max(tried)):
            beyond = round(best / 3 if best == min(tried) else best * 3, 9)
            tried[beyond] = self.alone(name, 0.25, beyond, SEARCH_SEED)["linear"]
        return dict(sorted(tried.items()))

    def run(self, sides: list[str]) -> dict[str, Any]:
        """Side -> its best rate and scores."""
        rows: dict[str, Any] = {}
        for name in sides:
            rows[name] = {"search": (tried := self._search(name))}
            rows[name]["blr"] = max(tried, key=lambda blr: tried[blr])
        for seed in range(self.given.seeds):
            for name, row in rows.items():
                row.setdefault("runs", []).append(self.alone(name, 1.0, row["blr"], seed))
        for name, row in rows.items():
            row |= {task: mean_and_std([run[task] for run in row["runs"]]) for task in ("knn", "linear")}
            row |= {"seconds_per_step": self.seconds[name], "images_per_s": self.batch_size(name) / self.seconds[name]}
        return rows


def _score(given: argparse.Namespace, job: tuple[Any, ...]) -> dict[str, float]:
    keep_freed_memory(torch.device("cpu"))
    return Study(given).score(*job)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--minutes", type=float, default=6.0, help="training time per run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--blrs", type=float, nargs="+", default=[1.5e-3, 6e-3, 1.6e-2])
    sides = [*PEERS, *OURS]
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides, help="to train now; the others later")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--until", choices=("calibrate", "report"), default="report", help="the last phase")
    given = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))
    study = Study(given)
    print(json.dumps({name: f"{1000 * seconds:.1f} ms per step" for name, seconds in study.seconds.items()}, indent=1))
    if given.until == "calibrate":
        return
    rows = study.run(given.sides)
    for name, row in rows.items():
        scores = (f"{100 * row[task]['mean']:.1f} ± {100 * row[task].get('std', 0):.1f}" for task in ("knn", "linear"))
        print(f"| {name} | {row['runs'][0]['steps']:,} | {' | '.join(scores)} | {row['images_per_s']:.0f} |")
    content = {"sides": rows, "minutes": given.minutes, "machine": machine(torch.device("cpu"))}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
