"""The base class of encoders, which is all that the rest of the package relies on."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.encoders.sharing import push_encoder, save_encoder
from dmjd.images.invalid import pooled_tokens, valid_pixels
from dmjd.images.preprocess import Preprocess
from dmjd.nn.layers import TRANSFORMER_NORM_EPS, init_linear, set_checkpointing
from dmjd.nn.tokens import gather_views, patchify, resize_positions, sincos_positions


class TimmModel(NamedTuple):
    """A model of timm with an encoder's parameter names and shapes.

    Attributes:
        name: model name for ``timm.create_model``.
        arguments: all arguments that define the model.
        defaults: arguments that the name implies.
    """

    name: str
    arguments: dict[str, Any]
    defaults: dict[str, Any]


class Encoder(nn.Module, ABC):
    """Base class of the encoders: images in, tokens out, computed for all patches or for the visible ones only.

    A family of encoders is one subclass and one entry in :data:`dmjd.encoders.registry.ENCODERS`. The rest of the
    package relies only on the class attributes, constructor and methods described here.

    A family defines
        - the class attributes below;
        - a constructor with keyword arguments ``img_size``, ``patch_size``, ``in_chans``, ``drop_path``, its sizes, and
          ``class_token`` if it supports one; they are what ``create_encoder`` accepts;
        - the modules ``blocks`` (a list of transformer blocks on tokens) and ``norm``, ``pos_embed`` (a parameter
          [1, prefix + N, D] or [1, N, D], or None), and the list ``feature_info``;
        - :meth:`forward_stages`, :meth:`forward_intermediates`, :meth:`block_outputs`,
          :meth:`prune_intermediate_layers`, :meth:`flops`; :class:`~dmjd.encoders.plain.PlainEncoder` has them for
          encoders that are blocks on tokens only;
        - where the defaults do not fit: :attr:`scales`, :meth:`layer_of`, :meth:`no_weight_decay`, :meth:`timm_model`,
          and for names of another form :attr:`NAME`, :attr:`NAMED`, :meth:`named_arguments`.

    Class attributes:
        SIZES: size name -> constructor arguments. An encoder is called ``<family>_<size>_patch<P>``.
        PATCHES: patch sizes in the list of names; the constructor may accept others.
        SETTINGS: setting of a run -> (constructor argument, number of values it takes).
        NAME: form of what follows the family in a name.
        NAMED: constructor arguments that only the name sets.

    Attributes:
        name: what ``create_encoder`` was called with.
        options: the keyword arguments of that call, as JSON types.
        img_size: (H, W) in pixels.
        grid: (h, w) in tokens.
        patch_size: P, side of a token in pixels.
        in_chans: C.
        embed_dim, num_features: D.
        num_prefix_tokens: class and register tokens before the patch tokens.
        scales: (width, cells per token side) of each convolutional stage, finest first; empty without such stages.
            Pre-training fuses them with the tokens.
        decoder_mlp_ratio: default MLP ratio of the reconstruction decoder.
        norm: the final norm; used in pre-training, but not part of pooled features.
        feature_info: for each map of :meth:`forward_intermediates` its width ("num_chs"), stride in pixels
            ("reduction") and module, as in timm. The feature pyramid takes the last map of each stride.
        preprocess: how images become input of this encoder; None if unknown.
        origin: what it was loaded from; None if nothing or unknown.
    """

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]]
    PATCHES: ClassVar[tuple[int, ...]]
    SETTINGS: ClassVar[Mapping[str, tuple[str, int]]] = {
        "embed_dim": ("embed_dim", 1),
        "depth": ("depth", 1),
        "num_heads": ("num_heads", 1),
        "mlp_ratio": ("mlp_ratio", 1),
    }
    NAME: ClassVar[re.Pattern[str]] = re.compile(r"_([a-z0-9]+)_patch(\d+)")
    NAMED: ClassVar[frozenset[str]] = frozenset({"patch_size"})

    pos_embed: nn.Parameter | None
    norm: nn.Module
    feature_info: list[dict[str, Any]]
    decoder_mlp_ratio: float
    scales: tuple[tuple[int, int], ...] = ()

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, num_prefix_tokens: int = 0
    ) -> None:
        super().__init__()
        H, W = img_size
        check_divisible(img_size, patch_size, "img_size", "the encoder's")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.name = type(self).__name__
        self.options: dict[str, Any] = {}
        self.img_size, self.grid = (H, W), (H // patch_size, W // patch_size)
        self.patch_size, self.in_chans = patch_size, in_chans
        self.embed_dim = self.num_features = embed_dim  # the latter is timm's name
        self.num_prefix_tokens = num_prefix_tokens
        self.preprocess: Preprocess | None = None
        self.origin: Path | None = None

    @classmethod
    def named_arguments(cls, rest: str) -> dict[str, Any] | None:
        """Constructor arguments that a name stands for, ``patch_size`` among them.

        Args:
            rest: the part of the name after the family.

        Returns:
            The arguments, or None for an unknown name.
        """
        match = cls.NAME.fullmatch(rest)
        if match is None or match[1] not in cls.SIZES or int(match[2]) == 0:
            return None
        return {**cls.SIZES[match[1]], "patch_size": int(match[2])}

    @property
    def num_patches(self) -> int:
        """N, number of patch tokens of an image of ``img_size``."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(cast(nn.ModuleList, self.blocks))

    def init_weights(self) -> None:
        """Initialize every linear layer as MAE does (see :func:`dmjd.nn.layers.init_linear`)."""
        self.apply(init_linear)

    @abstractmethod
    def forward_stages(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Block outputs before ``norm``, and outputs of the convolutional stages for multi-scale fusion.

        Args:
            images: [B, C, H, W] normalized.
            visible: [R, V] int64 ids of the tokens to compute, R = K * B, view-major; None = all.

        Returns:
            Tokens [R, prefix + V, D], and one [R, V, s, s, d] for each of ``scales``.
        """

    @abstractmethod
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of ``feature_info``, with timm's arguments.

        Args:
            x: [B, C, H, W] normalized images.
            indices: map indices (negative from the end), a number of last maps, or None for all.
            norm: apply the final norm to maps of block outputs.
            stop_early: skip the layers after the last requested map.
            output_fmt: "NCHW" for maps [B, D, h, w], "NLC" for tokens [B, N, D] without prefix tokens.
            intermediates_only: return the list alone, not (tokens after the final norm, list).
        """

    @abstractmethod
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last requested map (timm's protocol); returns the absolute indices."""

    @abstractmethod
    def block_outputs(self, images: Tensor, count: int) -> list[Tensor]:
        """Patch tokens after each of the last ``count`` transformer blocks, before the norm.

        Args:
            images: [B, C, H, W] normalized.
            count: 1 to :attr:`depth`.

        Returns:
            List of [B, N, D]; the last block comes last.
        """

    @abstractmethod
    def flops(self, num_visible: int | None = None) -> int:
        """Floating-point operations of a forward pass on one image with ``num_visible`` patch tokens (default: all)."""

    def layer_of(self, parameter: str) -> int:
        """Layer of a parameter, by its name, for layer-wise learning rate decay: 0 to :attr:`depth`.

        Transformer block i is layer i + 1; embeddings, positions, class token and convolutional stages are layer 0.
        """
        module, _, rest = parameter.partition(".")
        return int(rest.partition(".")[0]) + 1 if module == "blocks" else 0

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay, besides 1-D parameters (timm's protocol)."""
        return {"pos_embed"}

    def timm_model(self) -> TimmModel | None:
        """The model of timm that loads this encoder's state dict; None if there is none."""
        return None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, configuration and a model card to a folder.

        :func:`dmjd.load_encoder` loads the folder. If timm has the model, ``timm.create_model("local-dir:FOLDER",
        pretrained=True, num_classes=0)`` does so, too. The card states data, recipe, time and scores as far as the
        run that the encoder was loaded from tells them.

        Args:
            folder: created if missing. Of an earlier export, an edited model card and all other files are kept.

        Raises:
            ValueError: if the folder holds the weights or configuration of another program, or cannot be written.
        """
        save_encoder(self, folder)

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Upload the files of :meth:`save_pretrained` to the Hugging Face hub; returns the address.

        Args:
            repo: ``user/name``; created if there is none. ``dmjd.load_encoder("hf-hub:user/name")`` loads it.
            private: create it for yourself alone.

        Raises:
            ValueError: for a wrong name, without a token, or if the hub cannot be reached or refuses.
        """
        return push_encoder(self, repo, private)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Block outputs, before the final norm.

        Args:
            images: [B, C, H, W] normalized.
            visible: None for all tokens; [B, V] or [K, B, V] int64 raster ids to compute only those.

        Returns:
            [B, prefix + N, D], [B, prefix + V, D] or [K, B, prefix + V, D].
        """
        if visible is None:
            return self.forward_stages(images)[0]
        if visible.is_floating_point():
            raise ValueError(f"visible must hold integers, got {visible.dtype}")
        if visible.dim() not in (2, 3) or visible.shape[-2] != images.shape[0]:
            raise ValueError(
                f"visible must be [B, V] or [K, B, V] with B = {images.shape[0]}, got {list(visible.shape)}"
            )
        tokens = self.forward_stages(images, visible.flatten(0, -2))[0]  # R, prefix + V, D
        return tokens.unflatten(0, visible.shape[:-1])

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the final norm, [B, prefix + N, D]. The name is timm's."""
        return self.norm(self(images))

    def pool(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """The downstream feature: mean over patch tokens, then LayerNorm without affine.

        Args:
            tokens: [B, prefix + N, D] from :meth:`forward`.
            valid: the tokens that count, from :meth:`valid_tokens`; None: all.

        Returns:
            [B, D].
        """
        return F.layer_norm(self.mean_patch_token(tokens, valid), (self.embed_dim,), eps=TRANSFORMER_NORM_EPS)

    def valid_tokens(self, images: Tensor) -> Tensor | None:
        """The tokens of which at least half of the values are valid; all of an image that has none.

        Args:
            images: [B, C, H, W] normalized by the encoder's preprocessing, which marks invalid pixels.

        Returns:
            [B, N] bool; None if the preprocessing knows no invalid pixels, so that all tokens count.
        """
        if self.preprocess is None or self.preprocess.invalid is None:
            return None
        return pooled_tokens(valid_pixels(images), self.patch_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pooled features without gradient: ``pool(self(images))``, of the tokens of :meth:`valid_tokens`.

        Args:
            images: [B, C, H, W] normalized, as from ``encoder.preprocess(...)``, on the device of the encoder.

        Returns:
            [B, D]. The mode is the caller's: in training mode, stochastic depth is random. :func:`dmjd.load_encoder`
            returns an encoder in evaluation mode.
        """
        return self.pool(self(images), self.valid_tokens(images))

    def mean_patch_token(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mean over patch tokens: [B, prefix + N, D] -> [B, D]. Prefix tokens are left out.

        With ``valid`` [B, N] bool, over those that are valid; at least one of each image must be.
        """
        patches = tokens[:, self.num_prefix_tokens :]
        mean = patches.mean(dim=1)
        if valid is None:
            return mean
        counted = torch.where(valid.unsqueeze(-1), patches, 0.0).sum(dim=1) / valid.sum(dim=1, keepdim=True)
        return torch.where(valid.all(dim=1, keepdim=True), mean, counted.to(mean.dtype))

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """Token grid (h, w) of a batch; ValueError if its type, shape or number of channels does not fit."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor of floats, from encoder.preprocess(images), got {got}")
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got {list(images.shape)}")
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image of {H} x {W} pixels is not divisible by the {self.patch_size}-pixel patch")
        return H // self.patch_size, W // self.patch_size

    def visible_patches(self, images: Tensor, visible: Tensor | None) -> Tensor:
        """Pixels of the tokens to compute: [B, N, P*P*C], or [R, V, P*P*C] for ids [R, V].

        Pixels are gathered before they are embedded: this moves the least memory and embeds no masked token.
        """
        patches = patchify(images, self.patch_size)  # B, N, P*P*C
        return patches if visible is None else gather_views(patches, visible)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table of a grid, [1, prefix + h*w, D].

        For a grid other than the encoder's, a fixed table is recomputed, a learned one resized.

        Raises:
            ValueError: if the encoder has no position table.
        """
        if self.pos_embed is None:
            raise ValueError(f"{self.name} has no position table")
        if grid == self.grid:
            return self.pos_embed
        dim, prefix, device = self.embed_dim, self.num_prefix_tokens, self.pos_embed.device
        fixed = sincos_positions(dim, self.grid, prefix, device)
        if torch.allclose(self.pos_embed.detach().float(), fixed, atol=1e-5):
            return sincos_positions(dim, grid, prefix, device).to(self.pos_embed)
        return resize_positions(self.pos_embed, self.grid, grid)

    def state_for(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The state dict of the same encoder for images of another token grid."""
        positions = {} if self.pos_embed is None else {"pos_embed": self.positions(grid)}
        return self.state_dict() | positions

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass: less memory, about a quarter more arithmetic."""
        set_checkpointing(self, enable)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth rates of ``depth`` blocks, increasing linearly from 0 to ``last``."""
    if not 0.0 <= last < 1.0:
        raise ValueError(f"drop_path must lie in [0, 1), got {last}")
    return [last * i / max(1, depth - 1) for i in range(depth)]


def check_divisible(size: tuple[int, int], patch_size: int, what: str, whose: str) -> None:
    """Raise a ValueError, which names the nearest size that fits, if an image size is not made of whole patches.

    Args:
        size: height and width in pixels.
        patch_size: side of a patch in pixels.
        what: the setting or flag that gave the size, for the message.
        whose: whose patches, for the message: "the encoder's".
    """
    height, width = size
    if height % patch_size or width % patch_size or min(size) < patch_size:
        nearest = [max(1, round(side / patch_size)) * patch_size for side in size]
        raise ValueError(
            f"{what} {height} x {width} is not divisible by {whose} {patch_size}-pixel patch; "
            f"nearest that is: {nearest[0]} x {nearest[1]}"
        )


def known_preprocess(encoder: Encoder) -> Preprocess:
    """``encoder.preprocess``; ValueError if it is unknown."""
    if encoder.preprocess is None:
        raise ValueError(f"{encoder.name} does not know its preprocessing: set encoder.preprocess = Preprocess(...)")
    return encoder.preprocess
