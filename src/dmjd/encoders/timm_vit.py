"""Vision transformers of timm: every model of its classes ``VisionTransformer`` and ``Eva``.

The modules are timm's own, so parameters have timm's names. Blocks of the plain kind run with our kernels.
"""

import functools
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dmjd.config.checks import check_memory
from dmjd.encoders.base import TimmModel, drop_path_rates
from dmjd.encoders.plain import PlainEncoder, embed_patches
from dmjd.encoders.timm_names import CLASSES, INSTEAD, class_of
from dmjd.nn.modes import evaluating
from dmjd.nn.timm_blocks import own_block, run_block
from dmjd.nn.tokens import gather_positions, resize_positions

DECODER_MLP_RATIO = 4.0


class TimmViT(PlainEncoder):
    """A vision transformer of timm without its head, called ``timm/NAME``.

    Class and register tokens, learned and rotary positions, layer scale, gated MLPs and the other parts are timm's, and
    so is the initialization. Rotary positions follow the ids of the visible tokens; timm's random shifts and scales of
    them in training (DINOv3) are off.

    Args:
        img_size: (H, W) in pixels.
        model: name of the model, with or without a tag of weights, which is ignored.
        patch_size: side of a token in pixels.
        in_chans: C.
        class_token: add a class token to a model that has none by its name.
        drop_path: stochastic depth rate of the last block, increasing linearly from 0.
        embed_dim, depth, num_heads, mlp_ratio: sizes other than those of the name.

    Attributes:
        timm_arguments: arguments with which ``timm.create_model`` builds a model with these parameters.
        checkpointing: recompute blocks that are timm's own in the backward pass.

    Raises:
        ValueError: for a model that cannot leave tokens out, or arguments that timm does not take.
    """

    SIZES: ClassVar = {}
    PATCHES = ()
    NAME: ClassVar = re.compile(r"/(.+)")
    NAMED: ClassVar = frozenset({"model"})

    checkpointing = False

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        model: str,
        patch_size: int,
        in_chans: int = 3,
        class_token: bool = False,
        drop_path: float = 0.0,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
    ) -> None:
        drop_path_rates(drop_path, 1)  # its range
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        sizes |= {"class_token": class_token or None}
        arguments = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans}
        arguments |= {key: value for key, value in sizes.items() if value is not None}
        _check_memory(model, arguments)
        trunk = _build(model, arguments | {"drop_path_rate": drop_path})  # where stochastic depth acts
        super().__init__(img_size, patch_size, in_chans, trunk.embed_dim, trunk.num_prefix_tokens)
        self.model = model
        self.timm_arguments = arguments | _headless(model)
        self.decoder_mlp_ratio = DECODER_MLP_RATIO
        self.patch_embed = trunk.patch_embed
        self.cls_token, self.reg_token = trunk.cls_token, trunk.reg_token
        self.pos_embed = trunk.pos_embed
        self.norm_pre = trunk.norm_pre
        self.rope: nn.Module | None = getattr(trunk, "rope", None)
        self.rope_by_block = bool(getattr(trunk, "rope_mixed", False))
        rates = drop_path_rates(drop_path, len(trunk.blocks))
        self.blocks = nn.ModuleList(own_block(block, rate) for block, rate in zip(trunk.blocks, rates, strict=True))
        self.norm = trunk.norm
        self.feature_info = self.block_info(len(self.blocks))

    @classmethod
    def named_arguments(cls, rest: str) -> dict[str, Any] | None:
        """Model and patch size; see :class:`Encoder`.

        Raises:
            ValueError: for an unknown model, or one that cannot leave tokens out.
        """
        match = cls.NAME.fullmatch(rest)
        return None if match is None else {"model": match[1], "patch_size": _patch_size(match[1])}

    def train(self, mode: bool = True) -> "TimmViT":
        """Set the mode. Rotary positions stay in evaluation mode, in which timm computes them without augmentation."""
        super().train(mode)
        if self.rope is not None:
            self.rope.eval()
        return self

    def prepare(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """Embed patches, add positions, prepend the prefix tokens; see :class:`PlainEncoder`."""
        grid = self.check_images(images)
        x = embed_patches(self.patch_embed.proj, self.visible_patches(images, visible))
        x = self._add_prefix(self.patch_embed.norm(x), grid, visible)
        return self.norm_pre(x), self._bound_blocks(grid, visible)

    def _add_prefix(self, x: Tensor, grid: tuple[int, int], visible: Tensor | None) -> Tensor:
        """Patch tokens [R, V, D] -> tokens with positions [R, prefix + V, D]."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else None  # 1, prefix, D
        if self.pos_embed is not None:
            table = self.positions(grid)
            first = table.shape[1] - grid[0] * grid[1]  # 0: the prefix has no positions
            x = x + gather_positions(table[:, first:], visible)
            prefix = prefix + table[:, :first] if prefix is not None and first else prefix
        return x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)

    def _bound_blocks(self, grid: tuple[int, int], visible: Tensor | None) -> list[Callable[[Tensor], Tensor]]:
        """The blocks as functions of tokens, each with its rotary positions."""
        if self.rope is None:
            return [partial(self._run, block) for block in self.blocks]
        # [N, E]; with rotary positions of each block [depth, heads, N, E]
        table = cast(Any, self.rope).get_embed(shape=list(grid))
        if self.rope_by_block:
            return [partial(self._run_rotary, block, table[i], visible) for i, block in enumerate(self.blocks)]
        table = gather_rotary(table, visible)
        return [partial(self._run, block, rope=table) for block in self.blocks]

    def _run(self, block: nn.Module, x: Tensor, **arguments: Tensor) -> Tensor:
        own = hasattr(type(block), "checkpointing")  # checkpoints itself
        return run_block(block, x, self.checkpointing and not own, **arguments)

    def _run_rotary(self, block: nn.Module, table: Tensor, visible: Tensor | None, x: Tensor) -> Tensor:
        return self._run(block, x, rope=gather_rotary(table, visible))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table of a grid, [1, prefix + h*w, D] or [1, h*w, D]; resized for a grid other than the encoder's.

        Raises:
            ValueError: if the model has no position table.
        """
        if self.pos_embed is None:
            raise ValueError(f"{self.name} has no position table")
        return self.pos_embed if grid == self.grid else resize_positions(self.pos_embed, self.grid, grid)

    def flops(self, num_visible: int | None = None) -> int:
        """Floating-point operations of a forward pass, counted in one without data; see :class:`Encoder`."""
        V = num_visible if num_visible is not None else self.num_patches
        state = {name: value.to("meta") for name, value in [*self.named_parameters(), *self.named_buffers()]}
        images = torch.empty(1, self.in_chans, *self.img_size, device="meta")
        ids = torch.empty(1, V, dtype=torch.int64, device="meta")
        with evaluating(self), FlopCounterMode(display=False) as counter:
            functional_call(self, state, (images, ids))
        return counter.get_total_flops()

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay: those of timm; see :class:`Encoder`."""
        return {"pos_embed", "cls_token", "reg_token", "rope.freqs"}

    def timm_model(self) -> TimmModel:
        """The model itself, without a head; see :class:`Encoder`."""
        named = {"patch_size": _patch_size(self.model), "in_chans": 3}
        return TimmModel(self.model.partition(".")[0], self.timm_arguments, named)


def gather_rotary(table: Tensor, visible: Tensor | None) -> Tensor:
    """Rotary positions of the visible tokens, as timm's blocks take them.

    Args:
        table: [N, E], or [heads, N, E] if heads have their own.
        visible: [R, V] int64 ids; None = all tokens.

    Returns:
        [R, 1, V, E] or [R, heads, V, E]; the table itself for None.
    """
    if visible is None:
        return table
    rows = table[..., visible, :]  # R, V, E or heads, R, V, E
    return rows.unsqueeze(1) if table.dim() == 2 else rows.transpose(0, 1)


def _headless(model: str) -> dict[str, Any]:
    """Arguments of timm for a model without head; the norm after the pooling that some have becomes the final norm."""
    return {"num_classes": 0, "global_pool": "avg", CLASSES[class_of(model)]: False}


def _build(model: str, arguments: dict[str, Any]) -> Any:
    """The model of timm without a head, with random weights.

    Raises:
        ValueError: if timm cannot build it with these arguments.
    """
    headless = _headless(model)
    try:
        # dynamic_img_size: rotary positions are computed for any grid.
        return timm.create_model(model.partition(".")[0], **headless, **arguments, dynamic_img_size=True)
    # timm asserts some sizes and passes others on to torch; arguments that the name fixes are a TypeError.
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"timm cannot build {model} with {given}: {reason}") from None


class _WithoutValues(TorchFunctionMode):
    """Skips the initialization of tensors that have no values: there torch does parts of it in slow Python."""

    SKIPPED: ClassVar = {getattr(Tensor, f"{name}_") for name in ("normal", "uniform", "erfinv", "mul", "add", "clamp")}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if func in self.SKIPPED else func(*args, **(kwargs or {}))


def _sketch(model: str, arguments: dict[str, Any]) -> Any:
    """The model without weights, and with one block only if timm allows it."""
    with torch.device("meta"), _WithoutValues():
        try:
            return _build(model, arguments | {"depth": 1})
        except ValueError:  # its blocks have settings of their own
            return _build(model, arguments)


@functools.cache
def _patch_size(model: str) -> int:
    """Patch size that a name stands for.

    Raises:
        ValueError: for a model that cannot leave tokens out.
    """
    embed = _sketch(model, {}).patch_embed
    if type(embed) is not PatchEmbed:
        raise ValueError(f"timm/{model} has a convolutional stem, which mixes neighboring patches; {INSTEAD}")
    return embed.patch_size[0]


def _check_memory(model: str, arguments: dict[str, Any]) -> None:
    """Refuse a model that does not fit into memory, before it is built."""
    sketch = _sketch(model, arguments)
    block, total = (sum(p.numel() for p in part.parameters()) for part in (sketch.blocks[0], sketch))
    missing = max(0, arguments.get("depth", 12) - len(sketch.blocks))  # timm's names have about 12 blocks or more
    check_memory(f"timm/{model}", total + missing * block)
