"""Short trainings on the device that tests/cuda runs on."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support import TINY_FIELDS

from dmjd.config import recipes
from dmjd.data.train_loader import Batch
from dmjd.engine.device import make_fabric
from dmjd.engine.loop import Engine, Report
from dmjd.engine.stop_signal import StopSignal
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.run import make_engine
from dmjd.rng import image_keys
from dmjd.runs.build import build_model

DEVICE = os.environ.get("DMJD_TEST_DEVICE", "cuda")  # "cpu": run the tests of tests/cuda where there is no card

CONV_VIT = {"encoder": "conv_vit_tiny_patch8", "embed_dim": (8, 12, 16), "depth": (1, 1, 1), "mlp_ratio": None}

BATCH = 8


def tiny_engine(device: torch.device, steps: int, **changes: Any) -> Engine:
    """The engine of a run of a tiny model on 32-pixel images; every step is logged by default."""
    fields = TINY_FIELDS | {"device": device.type, "precision": "fp32", "batch_size": BATCH, "steps": steps, "blr": 0.1}
    config = recipes.dmjd(**fields | changes)
    model = build_model(config)
    model.encoder.preprocess = Preprocess(config.size)
    return make_engine(config, model, make_fabric(config.device, config.precision), BATCH, num_images=4 * BATCH)


def batches(device: torch.device) -> Iterator[Batch]:
    """Four batches of random images that lie on the device, with new keys each time."""
    images = torch.randint(0, 256, (4, BATCH, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_device, index = images.to(device), torch.arange(BATCH)
    keys = [image_keys(0, torch.full_like(index, n), index).to(device) for n in range(64)]
    for n in itertools.count():
        yield Batch(on_device[n % 4], keys[n % 64])


def train(engine: Engine) -> list[dict[str, float]]:
    """Run an engine to its end; returns the scalars of the logged steps."""
    logged: list[dict[str, float]] = []

    def keep(report: Report) -> None:
        if report.scalars is not None:
            logged.append(report.scalars)

    engine.run(batches(engine.fabric.device), [keep], StopSignal())
    return logged


def on_cpu(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of the weights of an engine's model."""
    return {key: value.detach().to("cpu", copy=True) for key, value in engine.task.state_dict().items()}


def write_images(folder: Path, count: int = 24) -> Path:
    """32-pixel images in two classes, with a training and a test part."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        part, kind = ("train", "test")[i % 3 == 0], ("dark", "light")[i % 2]
        (folder / part / kind).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 128, (32, 32, 3)) + 127 * (i % 2)
        Image.fromarray(image.astype(np.uint8)).save(folder / part / kind / f"{i:02d}.png")
    return folder
