"""Three steps in a process group of one, as torchrun starts them; prints the losses as JSON."""

import json

import torch
from device_runs import BATCH, DEVICE, train
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from support import TINY_FIELDS

from dmjd.config import recipes
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.run import make_engine
from dmjd.runs.build import build_model


def main() -> None:
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    fabric = Fabric(accelerator=DEVICE, devices=1, strategy=DDPStrategy(process_group_backend=backend))
    fabric.launch()
    settings = TINY_FIELDS | {"device": DEVICE, "precision": "fp32", "batch_size": BATCH, "steps": 3, "blr": 0.1}
    config = recipes.dmjd(**settings)
    model = build_model(config)
    model.encoder.preprocess = Preprocess(config.size)
    losses = [s["loss"] for s in train(make_engine(config, model, fabric, BATCH, num_images=4 * BATCH))]
    print(json.dumps({"backend": torch.distributed.get_backend(), "losses": losses}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
