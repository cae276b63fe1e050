"""The study: what is trained, for how long, and the files that travel between visits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders.headers import CHECKPOINT_FORMAT
from dmjd.engine.optim import OPTIMIZERS, parameter_groups
from dmjd.files import read_safetensors, write_safetensors
from dmjd.images.preprocess import Preprocess
from dmjd.pretraining.run import PretrainTask
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import load_checkpoint, optimizer_tensors, save_checkpoint

EPOCHS = 200

FINETUNE_EPOCHS = 50

BATCH = 512

# The same length, batch, crops, clipping and precision for all. Learning rates are 1.2e-3 times p / c; the mixture's,
# with Muon, is that of the recipe, scaled to the batch by the square root.
COMMON: dict[str, Any] = {
    "encoder": "vit_tiny_patch4",
    "img_size": (32,),
    "class_token": False,
    "batch_size": BATCH,
    "crop_scale": (0.5, 1.0),
    "clip_grad": 3.0,
    "blr": 6e-4,
    "precision": "bf16",
    "seed": 0,
    "eval_every": 0,
    "final_eval": False,
    "log_every": 100,
    "checkpoint_every": 1_000_000,
}

# name: (recipe, settings), in the order in which they are trained
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmjd": ("dmjd", {}),
    "mae75": ("mae", {"mask_ratio": 0.75}),
    "folder": ("folder", {"blr": 1e-3}),
    "mae90": ("mae", {"mask_ratio": 0.9}),
}

SCRATCH = "scratch"  # fine-tuned from random weights

TOY = {"embed_dim": (32,), "depth": (2,), "num_heads": 2, "batch_size": 16, "log_every": 2}


def config_of(variant: str, data: Path, out: Path, toy: bool, **changes: Any) -> PretrainConfig:
    """The configuration of a variant; tiny, and two epochs long, if ``toy``."""
    recipe, own = VARIANTS[variant]
    epochs = 2.0 if toy else float(EPOCHS)
    settings = COMMON | own | (TOY if toy else {}) | {"epochs": epochs} | changes
    return getattr(dmjd.recipes, recipe)(data=str(data), out=str(out), **settings)


def state_file(folder: Path, variant: str) -> Path:
    """The state of an unfinished pre-training, which travels between visits."""
    return folder / f"{variant}.state.safetensors"


def encoder_file(folder: Path, variant: str) -> Path:
    """A pre-trained encoder in half precision."""
    return folder / f"{variant}.encoder.safetensors"


def classifier_file(folder: Path, variant: str) -> Path:
    """A fine-tuned classifier in half precision."""
    return folder / f"{variant}.classifier.safetensors"


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in float16, which is more exact than bfloat16 for numbers of the size of weights."""
    return {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}


def write_half(source: Path, target: Path) -> None:
    """Copy a safetensors file of ours in half precision."""
    tensors, metadata = read_safetensors(source)
    write_safetensors(target, halved(tensors), metadata)


def save_state(checkpoint: Path, target: Path) -> None:
    """Write the weights of a checkpoint in half precision, without the optimizer's state, to travel."""
    loaded = load_checkpoint(checkpoint)
    tensors = {key: value for key, value in loaded.tensors.items() if key.startswith("model.")}
    state = {key: value for key, value in loaded.state.items() if key != "format"}
    write_safetensors(target, halved(tensors), {"format": CHECKPOINT_FORMAT} | state)


def restore_state(file: Path, config: PretrainConfig, run: Path) -> int:
    """Make a run folder that continues a state that traveled; returns the step.

    The optimizer starts with zero moments: with the betas of pre-training they forget within some twenty steps. Weights
    were rounded to half precision once.
    """
    state = load_checkpoint(file)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in state.tensors.items()}
    step = state.state["progress"]["step"]
    tensors |= {f"optimizer.{key}": value for key, value in fresh_moments(config).items()}
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(config.to_json(), encoding="utf-8")
    metadata = {key: value for key, value in state.state.items() if key != "format"}
    save_checkpoint(run / "checkpoints" / f"step-{step:09d}.safetensors", tensors, metadata)
    return step


def fresh_moments(config: PretrainConfig) -> dict[str, Tensor]:
    """The state of an optimizer that has taken no step, as a checkpoint holds it."""
    model = build_model(config)
    optimizer = OPTIMIZERS[config.optimizer](
        parameter_groups(PretrainTask(model, Preprocess(config.size)), config.weight_decay)
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()  # with learning rate 0 and no gradient; makes the state
    return {key: torch.zeros_like(value) for key, value in optimizer_tensors(optimizer).items()}
