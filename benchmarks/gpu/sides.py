"""What the speed part compares: models, and plain modules in place of the layers that recompute."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peers import DenseReference, hugging_face_mae
from torch import Tensor, nn

import dmjd
from dmjd.config.pretrain import PretrainConfig
from dmjd.encoders import conv_vit
from dmjd.nn import layers
from dmjd.rng import image_keys
from dmjd.runs.build import build_model

# comparison: (recipe, settings)
COMPARISONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-B, MAE": ("mae", {}),
    "ConvViT-B, DMJD": ("dmjd", {}),
    "ViT-B, DMJD": ("dmjd", {"encoder": "vit_base_patch16"}),
    "ConvViT-B, MAE": ("convmae", {}),
}

TOY = {"img_size": (32,), "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "num_heads": 2}

TOY_SIZES = {"vit": {"embed_dim": (32,), "depth": (2,)}, "conv": {"embed_dim": (8, 12, 16), "depth": (1, 1, 2)}}

TOY_TRANSFORMERS = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}


def config_of(comparison: str, toy: bool) -> PretrainConfig:
    """The configuration of a comparison; a tiny encoder with the same method if ``toy``."""
    recipe, settings = COMPARISONS[comparison]
    config = getattr(dmjd.recipes, recipe)(**settings)
    if not toy:
        return config
    family = "conv" if config.encoder.startswith("conv") else "vit"
    return config.replace(encoder=config.encoder.replace("base_patch16", "tiny_patch8"), **TOY, **TOY_SIZES[family])


class Side:
    """A model with its optimizer, ready to take steps.

    Args:
        comparison: key of :data:`COMPARISONS`.
        kind: "dmjd", "dense reference" or "transformers".
        device: device of the model.
        toy: tiny models.
        compiled: use ``torch.compile``.

    Attributes:
        model: our pre-training model, also where another one is measured, for its count of operations.
    """

    def __init__(self, comparison: str, kind: str, device: torch.device, toy: bool, compiled: bool) -> None:
        config = config_of(comparison, toy)
        self.model, self.device, self.size = build_model(config), device, config.size
        self._kind, self._count = kind, 0
        self._images: dict[int, Tensor] = {}
        module: nn.Module = self.model
        if kind == "transformers":
            module = hugging_face_mae(**TOY_TRANSFORMERS if toy else {})
        elif kind == "dense reference":
            module = DenseReference(self.model)
        module = module.to(device).train()
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        self._run = torch.compile(module) if compiled else module

    def step(self, batch: int) -> Tensor:
        """One training step on ``batch`` images, in bf16, with new masks; returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self._run(*self._inputs(batch))
        loss = out["loss"] if isinstance(out, dict) else out
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def forget(self) -> None:
        """Free gradients and images after a step that ran out of memory."""
        self._optimizer.zero_grad(set_to_none=True)
        self._images.clear()

    def _inputs(self, batch: int) -> tuple[Any, ...]:
        if batch not in self._images:
            generator = torch.Generator(device=self.device).manual_seed(0)
            shape = (batch, 3, *self.size)
            raw = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)
            self._images = {batch: raw.float()}
        raw = self._images[batch]
        images = (raw / 255 - 0.45) / 0.225
        if self._kind == "transformers":
            return (images,)
        self._count += 1
        index = torch.arange(batch, device=self.device)
        keys = image_keys(0, torch.full_like(index, self._count), index)
        return (images, raw, keys) if self._kind == "dense reference" else (images, raw, None, keys)


def plain_norm_linear(norm: nn.LayerNorm, linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(norm(x)) that saves what plain modules save."""
    return linear(norm(x))


def plain_norm_mlp(norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, x: Tensor, keep_hidden: bool = True) -> Tensor:
    """fc2(gelu(fc1(norm(x)))) that saves what plain modules save."""
    return fc2(F.gelu(fc1(norm(x))))


def plain_depthwise(conv: nn.Conv2d, x: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
    """The depthwise convolution of a visible map by scatter, ``nn.Conv2d`` and gather."""
    D, height_width = x.shape[-1], size[0] * size[1]
    dense = x.new_zeros(x.shape[0] * height_width, D).index_copy(0, cells, x.reshape(-1, D))
    y = conv(dense.view(x.shape[0], *size, D).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y.reshape(-1, D).index_select(0, cells).view(x.shape)


PLAIN = {
    "plain": ((layers, "norm_linear", plain_norm_linear), (layers, "norm_mlp", plain_norm_mlp)),
    "plain depthwise": ((conv_vit, "visible_depthwise", plain_depthwise),),
}


@contextlib.contextmanager
def layers_of(name: str) -> Iterator[None]:
    """Within the block, models run with our layers ("recompute"), or with the plain ones named, such as "plain"."""
    parts = [part for part in name.split(" + ") if part != "recompute"]
    changes = [change for part in parts for change in PLAIN[part]]
    before = [getattr(module, attribute) for module, attribute, _ in changes]
    for module, attribute, function in changes:
        setattr(module, attribute, function)
    try:
        yield
    finally:
        for (module, attribute, _), function in zip(changes, before, strict=True):
            setattr(module, attribute, function)
