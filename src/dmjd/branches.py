"""The two light branches on the shared encoder (DMJD, section III-B): reconstruction of the masked tokens and
distillation on the visible ones.

:class:`Reconstruction` and :class:`Distillation` are settings; ``build`` makes the branch for an encoder. A branch
holds its network and its loss. Targets belong to the model, which computes a target that two branches share only once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.config.checks import (
    MAX_FACTOR,
    MAX_MLP_RATIO,
    MAX_WIDTH,
    Bounds,
    check_float,
    check_int,
    check_memory,
)
from dmjd.encoders.base import Encoder
from dmjd.masking import Masks, num_decoded
from dmjd.nn.layers import (
    TRANSFORMER_NORM_EPS,
    TransformerBlock,
    TransformerNorm,
    block_flops,
    init_linear,
    strided_conv,
)
from dmjd.nn.tokens import gather_tokens, gather_views, sincos_positions
from dmjd.targets.base import Target, TargetSettings

LOSSES = ("l2", "smooth_l1")

SMOOTH_L1_BETA = 2.0


def regression_loss(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens and entries, in float32: "l2" is the mean squared error, "smooth_l1" has beta 2."""
    prediction = prediction.float()
    if kind == "l2":
        return F.mse_loss(prediction, target)
    return F.smooth_l1_loss(prediction, target, beta=SMOOTH_L1_BETA)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"unknown loss '{loss}'; choose one of {', '.join(LOSSES)}")


def _check_sizes(settings: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(settings, name)) is not None:
            check_int(name, value, Bounds(ge=1, most=MAX_WIDTH))


def default_decoder(embed_dim: int) -> tuple[int, int, int]:
    """(width, depth, heads) of the default decoder: the published 512 x 8 for encoders of width 768 and up.

    Smaller encoders get a smaller decoder: with a tiny encoder, 512 x 8 would take 90 % of the time.
    """
    if embed_dim >= 768:
        return 512, 8, 16
    return (256, 2, 8) if embed_dim >= 384 else (128, 2, 4)


class Branch(nn.Module, ABC):
    """A head on the latent tokens of the encoder and its loss.

    Args:
        loss: "l2" or "smooth_l1".
        weight: factor of the loss in the model's total.
    """

    def __init__(self, loss: str, weight: float = 1.0) -> None:
        super().__init__()
        self.loss_kind, self.weight = loss, weight

    def train_masks(self, masks: Masks) -> Masks:
        """Masks for the loss in training; the same masks unless overridden."""
        return masks

    @abstractmethod
    def token_ids(self, masks: Masks) -> Tensor:
        """Ids of the tokens that the branch predicts: [K, B, n] int64."""

    @abstractmethod
    def forward(self, latent: Tensor, masks: Masks) -> Tensor:
        """Predict: latent [R, prefix + V, D] -> [R, n, C], in the order of :meth:`token_ids`."""

    def loss(self, predictions: Tensor, targets: Tensor, masks: Masks, valid: Tensor | None = None) -> Tensor:
        """Mean loss over views, images, tokens and entries, a scalar.

        Invalid tokens add 0 to it and stay in the denominator: so each valid token of a run counts the same, and a step
        in several micro-batches or processes is the same step.

        Targets are gathered by the ids that were predicted. The published code compares the visible branch's shuffled
        tokens with targets in raster order instead.

        Args:
            predictions: [R, n, C] from :meth:`forward`.
            targets: [B, N, C] float32.
            valid: [B, N] bool; None: all tokens are valid.
        """
        ids = self.token_ids(masks).flatten(0, 1)  # R, n
        own = gather_views(targets, ids)  # R, n, C
        if valid is not None:
            predictions = torch.where(gather_views(valid.unsqueeze(-1), ids), predictions.float(), own)
        return regression_loss(self.loss_kind, predictions, own)

    @abstractmethod
    def flops(self, num_visible: int, num_masked: int) -> int:
        """Floating-point operations of one forward pass of one view in training."""


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the branch that reconstructs the masked tokens.

    Args:
        target: name of a target (:data:`dmjd.targets.TARGETS`), its settings, or a :class:`~dmjd.targets.Target`.
        loss: "l2" or "smooth_l1".
        decoder_dim: width of the decoder; None = by the encoder's width (:func:`default_decoder`).
        decoder_depth: transformer blocks of the decoder; None = by the encoder's width.
        decoder_heads: attention heads of the decoder; None = by the encoder's width.
        decoder_mlp_ratio: MLP ratio of the decoder; None = that of the encoder.
        decode_ratio: share of the masked tokens, drawn at random, that the decoder predicts in training.

    Raises:
        ValueError: for an unknown loss or a ratio out of range.
    """

    target: str | TargetSettings | Target = "hog"
    loss: str = "l2"
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    decoder_mlp_ratio: float | None = None
    decode_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        _check_sizes(self, "decoder_dim", "decoder_depth", "decoder_heads")
        if self.decoder_mlp_ratio is not None:
            check_float("decoder_mlp_ratio", self.decoder_mlp_ratio, Bounds(gt=0, most=MAX_MLP_RATIO))
        check_float("decode_ratio", self.decode_ratio, Bounds(gt=0, le=1))

    def build(self, encoder: Encoder, out_dim: int) -> Branch:
        """Build the branch for an encoder, with new weights. It predicts ``out_dim`` = C numbers per token."""
        return ReconstructionBranch(encoder, out_dim, self)


@dataclass(frozen=True)
class Distillation:
    """Settings of the branch that distills target features into the visible tokens.

    Args:
        target: name of a target (:data:`dmjd.targets.TARGETS`), its settings, or a :class:`~dmjd.targets.Target`.
        loss: "l2" or "smooth_l1".
        theta: weight of the loss.
        projector_dim: width of the projector; None = that of the default decoder.
        projector_depth: linear layers of the projector.

    Raises:
        ValueError: for an unknown loss.
    """

    target: str | TargetSettings | Target = "hog"
    loss: str = "smooth_l1"
    theta: float = 1.0
    projector_dim: int | None = None
    projector_depth: int = 3

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        _check_sizes(self, "projector_dim", "projector_depth")
        check_float("theta", self.theta, Bounds(ge=0, most=MAX_FACTOR))

    def build(self, encoder: Encoder, out_dim: int) -> Branch:
        """Build the branch for an encoder, with new weights. It predicts ``out_dim`` = C numbers per token."""
        return DistillationBranch(encoder, out_dim, self)


class ReconstructionBranch(Branch):
    """Predicts the targets of the masked tokens from the visible ones."""

    def __init__(self, encoder: Encoder, out_dim: int, settings: Reconstruction) -> None:
        super().__init__(settings.loss)
        self.decode_ratio = settings.decode_ratio
        given = (settings.decoder_dim, settings.decoder_depth, settings.decoder_heads)
        defaults = default_decoder(encoder.embed_dim)
        dim, depth, heads = (d if g is None else g for g, d in zip(given, defaults, strict=True))
        if dim % heads or dim % 4:
            raise ValueError(f"decoder_dim {dim} must be divisible by 4 and by decoder_heads {heads}")
        self.decoder = ReconstructionDecoder(
            encoder.embed_dim,
            encoder.grid,
            dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=settings.decoder_mlp_ratio or encoder.decoder_mlp_ratio,
            out_dim=out_dim,
            num_prefix_tokens=encoder.num_prefix_tokens,
        )

    def train_masks(self, masks: Masks) -> Masks:
        """Masks that keep only the masked tokens that the decoder predicts in training."""
        return masks.subset_masked(self.decode_ratio)

    def token_ids(self, masks: Masks) -> Tensor:
        """[K, B, M] ids of the masked tokens."""
        return masks.masked

    def forward(self, latent: Tensor, masks: Masks) -> Tensor:
        """[R, prefix + V, D] -> [R, M, C]."""
        return self.decoder(latent, masks.visible.flatten(0, 1), masks.masked.flatten(0, 1))

    def flops(self, num_visible: int, num_masked: int) -> int:
        """Floating-point operations of one forward pass of one view in training."""
        return self.decoder.flops(num_visible, num_decoded(num_masked, self.decode_ratio))


class DistillationBranch(Branch):
    """Predicts the targets of the visible tokens from these tokens alone."""

    def __init__(self, encoder: Encoder, out_dim: int, settings: Distillation) -> None:
        super().__init__(settings.loss, settings.theta)
        self.num_prefix_tokens = encoder.num_prefix_tokens
        dim = settings.projector_dim or default_decoder(encoder.embed_dim)[0]
        self.head = DistillationHead(encoder.embed_dim, dim, out_dim, settings.projector_depth)

    def token_ids(self, masks: Masks) -> Tensor:
        """[K, B, V] ids of the visible tokens."""
        return masks.visible

    def forward(self, latent: Tensor, masks: Masks) -> Tensor:
        """[R, prefix + V, D] -> [R, V, C]."""
        return self.head(latent[:, self.num_prefix_tokens :])

    def flops(self, num_visible: int, num_masked: int) -> int:
        """Floating-point operations of one forward pass of one view."""
        return 2 * num_visible * sum(p.numel() for p in self.parameters() if p.dim() > 1)


class ReconstructionDecoder(nn.Module):
    """Mask tokens at the masked positions, position embeddings, transformer blocks, linear head (MAE).

    Args:
        encoder_dim: D.
        grid: (h, w) tokens.
        num_prefix_tokens: class tokens; they pass through the decoder, but are not predicted.
        dim: width of the transformer.
        depth: transformer blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs divided by ``dim``.
        out_dim: C, numbers predicted per token.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        out_dim: int,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        check_memory("the decoder", depth * dim * dim * (4 + 2 * mlp_ratio))
        self.num_prefix_tokens, self.mlp_ratio = num_prefix_tokens, mlp_ratio
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid, num_prefix_tokens), requires_grad=False)
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = TransformerNorm(dim)
        self.head = nn.Linear(dim, out_dim)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor, all_tokens: bool = False) -> Tensor:
        """Predict the masked tokens.

        The blocks do not depend on token order, so mask tokens are appended to the visible ones instead of scattered.

        Args:
            latent: [R, prefix + V, D].
            visible: [R, V] ids in the latent's order.
            masked: [R, M] ids.
            all_tokens: predict the visible ones too.

        Returns:
            [R, M, C] in the order of ``masked``; with ``all_tokens`` [R, V + M, C], visible first.
        """
        P, V = self.num_prefix_tokens, visible.shape[1]
        x = self.embed(latent)  # R, prefix + V, dim
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)  # R, M, dim
        table = self.pos_embed[:, P:].expand(x.shape[0], -1, -1)  # R, N, dim
        positions = gather_tokens(table, torch.cat([visible, masked], dim=1))  # R, V + M, dim
        if P:
            positions = torch.cat([self.pos_embed[:, :P].expand(x.shape[0], -1, -1), positions], dim=1)
        x = torch.cat([x, mask_tokens], dim=1) + positions  # R, prefix + V + M, dim
        for block in self.blocks[:-1]:
            x = block(x)
        # The last block computes only the tokens that are predicted; these attend to all tokens.
        return self.head(self.norm(self.blocks[-1](x, skip=P if all_tokens else P + V)))

    def flops(self, num_visible: int, num_masked: int) -> int:
        """Floating-point operations of one pass of one view; the last block and the head see masked tokens only."""
        dim, T = self.embed.out_features, self.num_prefix_tokens + num_visible + num_masked
        embed = 2 * (T - num_masked) * self.embed.in_features * dim
        blocks = (len(self.blocks) - 1) * block_flops(T, dim, self.mlp_ratio)
        blocks += block_flops(T, dim, self.mlp_ratio, skip=T - num_masked)
        return embed + blocks + 2 * num_masked * dim * self.head.out_features


class DistillationHead(nn.Module):
    """A projector on each visible token, followed by a linear predictor.

    Args:
        encoder_dim: D.
        dim: width of the projector.
        out_dim: C, numbers predicted per token.
        depth: linear layers of the projector; three in the paper.
    """

    def __init__(self, encoder_dim: int, dim: int, out_dim: int, depth: int = 3) -> None:
        super().__init__()
        check_memory("the projector", depth * dim * dim)
        layers: list[nn.Module] = [nn.Linear(encoder_dim, dim)]
        for _ in range(depth - 1):
            layers += [TransformerNorm(dim), nn.GELU(), nn.Linear(dim, dim)]
        self.projector = nn.Sequential(*layers, nn.LayerNorm(dim, eps=TRANSFORMER_NORM_EPS, elementwise_affine=False))
        self.predictor = nn.Linear(dim, out_dim)
        self.apply(init_linear)

    def forward(self, latent: Tensor) -> Tensor:
        """Visible tokens without prefix [R, V, D] -> predictions for the same tokens [R, V, C]."""
        return self.predictor(self.projector(latent))


class MultiScaleFusion(nn.Module):
    """Adds the convolutional stages to the latent tokens in pre-training (ConvMAE), by one strided convolution each.

    Args:
        scales: (width, cells per token side) of each stage.
        dim: D.
    """

    def __init__(self, scales: tuple[tuple[int, int], ...], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, dim, cells, cells) for width, cells in scales)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """[R, V, s, s, d] of each stage -> [R, V, D]."""
        convs = (cast(nn.Conv2d, conv) for conv in self.convs)
        fused = [strided_conv(conv, x).flatten(2) for conv, x in zip(convs, stages, strict=True)]
        return torch.stack(fused).sum(0)

    def flops(self, num_visible: int) -> int:
        """Floating-point operations of one forward pass of one view."""
        return 2 * num_visible * sum(p.numel() for p in self.parameters() if p.dim() > 1)
