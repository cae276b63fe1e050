"""Sharded training (FSDP2): every process holds a part of each weight, gradient and optimizer state.

A block is put together from its parts only while it computes. The layers outside of blocks are one more unit, which is
whole from the forward pass to the end of the backward pass.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_BLOCK = re.compile(r"(?:.*\.)?blocks\d?\.\d+")  # name of a module that is called as one


class ShardedStrategy(DDPStrategy):
    """The processes are those of DDP; the module is one that :func:`shard` has divided."""

    def setup_module(self, module: nn.Module) -> Any:
        """Return the module unchanged."""
        return module


def is_sharded(fabric: Fabric) -> bool:
    """Whether processes hold parts of a model."""
    return isinstance(fabric.strategy, ShardedStrategy)


def shard(module: nn.Module, fabric: Fabric, compile: bool = False) -> None:
    """Divide the parameters of a module among the processes, in place and on their devices.

    Args:
        module: what is called in training; equal in all processes. Its optimizer must be made afterwards.
        fabric: with a :class:`ShardedStrategy`.
        compile: use ``torch.compile`` for each block; putting it together is not part of what is compiled.
    """
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    for name, part in module.named_modules():
        if _BLOCK.fullmatch(name):
            if compile:
                part.compile()
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which must all call this; others unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def divided_like(value: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole tensor that all have, divided as ``like``; the tensor itself if that is whole."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    own = value.to(like.device)
    return distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)


def own_part(value: Tensor) -> Tensor | None:
    """What this process writes of a tensor: its part; of a whole one everything in the first process, else None.

    The parts of all processes, in the order of their ranks, are the tensor, divided along its first dimension.
    """
    if isinstance(value, DTensor):
        return value.to_local()
    return value if torch.distributed.get_rank() == 0 else None


class WholeModel:
    """The whole of a sharded model, in the first process, for what needs it: evaluations and checkpoints.

    It has its weights from :meth:`gather` to :meth:`release`, and takes hardly any memory otherwise. In the beginning
    it has those of the model.

    Args:
        model: part of a module that is to be sharded, or all of it, before that. Afterwards it loads whole tensors.
        fabric: the processes.

    Attributes:
        model: the whole model; in other processes the sharded one.
        optimizer: state of the optimizer as of :meth:`gather`, whole and on the CPU.
    """

    def __init__(self, model: nn.Module, fabric: Fabric) -> None:
        self._sharded, self._is_first = model, fabric.is_global_zero
        self.model: Any = copy.deepcopy(model).to(fabric.device) if self._is_first else model
        self.optimizer: dict[str, Tensor] = {}
        model.register_load_state_dict_pre_hook(_divide)

    @torch.no_grad()
    def gather(self, optimizer: Mapping[str, Tensor] | None = None) -> None:
        """Put weights, and state of the optimizer if it is given, together, one tensor at a time.

        All processes must call this at the same step.
        """
        own = _tensors(self.model)
        for name, value in _tensors(self._sharded).items():
            together = whole(value)
            if self._is_first:
                storage = own[name].untyped_storage()
                storage.resize_(together.numel() * together.element_size())
                own[name].copy_(together)
        self.optimizer = {}
        for name, value in (optimizer or {}).items():
            together = whole(value)
            if self._is_first:
                self.optimizer[name] = together.cpu()

    def release(self) -> None:
        """Free the memory of the weights and of the state of the optimizer."""
        self.optimizer = {}
        if self._is_first:
            for value in _tensors(self.model).values():
                value.untyped_storage().resize_(0)


def together(model: Any, whole: WholeModel | None) -> Any:
    """The model to evaluate: the whole of a sharded one, or the model itself."""
    return model if whole is None else whole.model


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, which all have memory of their own."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _divide(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Divide the whole tensors of a state that a sharded module is about to load, in place."""
    own = module.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor) and isinstance(like := own.get(name), DTensor):
            state[name] = divided_like(value, like)
