"""Sharded models against whole ones; what the two processes of a test do."""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from tiny_models import KEYS, smooth_images, tiny_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dmjd.encoders.registry import create_encoder
from dmjd.engine.device import make_fabric
from dmjd.engine.optim import muon, parameter_groups
from dmjd.engine.sharding import WholeModel, divided_like, shard, whole
from dmjd.masking import DisjointMasks
from dmjd.model import MaskedImageModel
from dmjd.runs.checkpoint import optimizer_tensors

ROTARY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}

MODELS: dict[str, Callable[[], MaskedImageModel]] = {
    "vit": lambda: tiny_model(encoder={"class_token": True}, target="ema"),
    "conv_vit": lambda: tiny_model("conv_vit_tiny_patch8"),
    "timm's blocks": lambda: MaskedImageModel(
        create_encoder("timm/vit_small_patch16_dinov3", **ROTARY), DisjointMasks(block_size=1)
    ),
}


def same_gradients_and_state() -> None:
    """All models, with and without activation checkpointing; two micro-batches of each process for a gradient."""
    fabric = make_fabric("cpu", "fp32", strategy="fsdp")
    for name, build in MODELS.items():
        for checkpointing in (False, True):
            torch.manual_seed(0)
            check(build(), checkpointing, fabric)
            print(f"{name}, checkpointing {checkpointing}: the same", file=sys.stderr)


def same_gradients_and_state_compiled() -> None:
    """As traced for compilation, without the compiler of CPU code, which takes minutes."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    fabric = make_fabric("cpu", "fp32", strategy="fsdp")
    for checkpointing in (False, True):
        torch.manual_seed(0)
        check(MODELS["vit"](), checkpointing, fabric, compile=True)
        print(f"checkpointing {checkpointing}: the same", file=sys.stderr)
    traced = torch._dynamo.utils.counters  # type: ignore[attr-defined]
    assert traced["stats"]["unique_graphs"] > 0
    assert not traced["graph_break"]


def same_steps_of_muon() -> None:
    """Given the same gradients, for weights of all kinds; the state is that of the whole ones, in parts."""
    fabric = make_fabric("cpu", "fp32", strategy="fsdp")
    torch.manual_seed(0)
    model = MODELS["conv_vit"]()
    reference = copy.deepcopy(model)
    shard(model, fabric)
    optimizers = [muon(parameter_groups(one, 0.05)) for one in (model, reference)]
    for _ in range(3):
        for own, parameter in zip(model.parameters(), reference.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
                own.grad = divided_like(parameter.grad, own)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
    states = [optimizer_tensors(optimizer) for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    assert any(name.endswith("momentum_buffer") and isinstance(value, DTensor) for name, value in states[0].items())
    for name, value in states[0].items():
        assert torch.equal(whole(value), states[1][name]), name
    for (name, own), parameter in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(whole(own.detach()), parameter), name
    print("the same", file=sys.stderr)


def check(model: MaskedImageModel, checkpointing: bool, fabric: Fabric, compile: bool = False) -> None:
    reference = copy.deepcopy(model)
    together = WholeModel(model, fabric)
    model.set_grad_checkpointing(checkpointing)
    shard(model, fabric, compile)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for batch, keys in batches(fabric.global_rank):
        (model(*batch, keys=keys)["loss"] / 2).backward()
    for rank in range(2):
        for batch, keys in batches(rank):
            (reference(*batch, keys=keys)["loss"] / 4).backward()
    for (name, own), parameter in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (own.grad is None) == (parameter.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(whole(own.grad), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    local = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    held = fabric.all_reduce(torch.tensor(float(local)), reduce_op="sum")
    assert held == sum(parameter.numel() for parameter in reference.parameters())
    check_state(model, reference, together, fabric)


def batches(rank: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """The two micro-batches of a process."""
    normalized, raw = smooth_images(3)
    for part in range(2):
        shift = 2 * rank + part
        yield (normalized.roll(shift, dims=3), raw.roll(shift, dims=3)), KEYS + shift


def check_state(model: nn.Module, reference: MaskedImageModel, together: WholeModel, fabric: Fabric) -> None:
    """The whole of a model has its weights when they are gathered, and takes no memory otherwise."""
    other = {name: value + 1 for name, value in reference.state_dict().items() if isinstance(value, Tensor)}
    model.load_state_dict(reference.state_dict() | other)
    optimizer: dict[str, Any] = {"0.step": torch.tensor(3.0)}
    for name, parameter in model.named_parameters():
        part = divided_like(other[name], parameter)
        assert isinstance(part, DTensor)
        assert part.to_local().untyped_storage().nbytes() == 4 * part.to_local().numel()  # no view of the whole
        assert torch.equal(whole(part), other[name])
        optimizer[name] = part
    for _ in range(2):
        together.release()
        together.gather(optimizer)
    if fabric.is_global_zero:
        assert all(torch.equal(value, other[name]) for name, value in together.model.named_parameters())
        assert together.optimizer.keys() == optimizer.keys()
        assert all(torch.equal(together.optimizer[name], other[name]) for name, _ in model.named_parameters())
        assert together.optimizer["0.step"] == 3.0
    together.release()
    if fabric.is_global_zero:
        assert not any(value.untyped_storage().nbytes() for value in together.model.parameters())
    assert not together.optimizer
