"""The method, top to bottom (DMJD, section III): masks -> K views -> one encoder -> two branches -> loss.

Shapes: B image, K view, R = K * B rows (view-major), N token, V visible, M masked, D width, C target entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmjd.branches import DistillationHead, MultiScaleFusion, ReconstructionDecoder, default_decoder
from dmjd.encoders.base import Encoder
from dmjd.masking import Masks, asked_count, disjoint_masks, mask_counts, resolve_block_size
from dmjd.nn.layers import set_checkpointing
from dmjd.nn.tokens import gather_views
from dmjd.targets.base import Target
from dmjd.targets.registry import create_target

LOSSES = ("l2", "smooth_l1")

SMOOTH_L1_BETA = 2.0


def regression_loss(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens and entries, in float32: "l2" is the mean squared error, "smooth_l1" has beta 2."""
    prediction = prediction.float()
    if kind == "l2":
        return F.mse_loss(prediction, target)
    return F.smooth_l1_loss(prediction, target, beta=SMOOTH_L1_BETA)


class MaskedImageModel(nn.Module):
    """Disjoint masking with joint distillation around any encoder.

    Args:
        encoder: the encoder to pre-train.
        target: name of the learning target of both branches, or a ready :class:`~dmjd.targets.base.Target`.
        mim_target, vis_target: targets of the branches apart; None = ``target``.
        num_views: K. mask_ratio: c. pred_ratio: p, None = as disjoint as possible.
        block_size: masking block in tokens; None = 2 where it divides the grid, else 1.
        disjoint: False draws the views independently (the ablation).
        decoder_dim, decoder_depth, decoder_heads: of the reconstruction decoder; None = by the encoder's width
            (:func:`~dmjd.branches.default_decoder`). decoder_mlp_ratio: None = the encoder's first.
        decode_ratio: share of the masked tokens that the decoder is asked for in training, drawn anew for each view.
        projector_depth: linear layers of the distillation branch's projector.
        mim: build the reconstruction branch. vis: build the distillation branch.
        theta: weight of the distillation loss.
        mim_loss, vis_loss: "l2" or "smooth_l1".
        hog_cell: side of a HOG cell in pixels; None = by the patch.

    Raises:
        ValueError: for combinations that cannot be; nothing long has started by then.
    """

    def __init__(
        self,
        encoder: Encoder,
        target: str | Target = "hog",
        *,
        mim_target: str | Target | None = None,
        vis_target: str | Target | None = None,
        num_views: int = 2,
        mask_ratio: float = 0.6,
        pred_ratio: float | None = None,
        block_size: int | None = None,
        disjoint: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        decoder_mlp_ratio: float | None = None,
        decode_ratio: float = 1.0,
        projector_depth: int = 3,
        mim: bool = True,
        vis: bool = True,
        theta: float = 1.0,
        mim_loss: str = "l2",
        vis_loss: str = "smooth_l1",
        hog_cell: int | None = None,
    ) -> None:
        super().__init__()
        if not (mim or vis):
            raise ValueError("both branches are off: leave mim or vis on")
        if bad := [loss for loss in (mim_loss, vis_loss) if loss not in LOSSES]:
            raise ValueError(f"unknown loss '{bad[0]}'; choose one of {', '.join(LOSSES)}")
        self.encoder = encoder
        self.num_views, self.mask_ratio, self.pred_ratio = num_views, mask_ratio, pred_ratio
        self.block_size = resolve_block_size(encoder.grid, block_size)
        self.disjoint, self.theta, self.mim_loss, self.vis_loss = disjoint, theta, mim_loss, vis_loss
        if not disjoint and pred_ratio is not None:
            raise ValueError("pred_ratio has no meaning with disjoint=False; leave one of them out")
        if not 0 < decode_ratio <= 1:
            raise ValueError(f"decode_ratio must be greater than 0 and at most 1, got {decode_ratio}")
        self.decode_ratio = decode_ratio
        units = encoder.num_patches // self.block_size**2
        self.counts = tuple(n * self.block_size**2 for n in mask_counts(units, num_views, mask_ratio, pred_ratio))
        mim_target = target if mim_target is None else mim_target
        vis_target = target if vis_target is None else vis_target
        self.mim, self.vis = mim, vis
        self.branch_targets = nn.ModuleDict()  # a target shared by both branches is held, saved and computed once
        if mim:
            self.branch_targets["mim"] = self._target(mim_target, hog_cell)
        if vis and not (mim and vis_target == mim_target):
            self.branch_targets["vis"] = self._target(vis_target, hog_cell)
        dim, depth, heads = (
            default if given is None else given
            for given, default in zip(
                (decoder_dim, decoder_depth, decoder_heads), default_decoder(encoder.embed_dim), strict=True
            )
        )
        if min(dim, depth, heads) < 1 or dim % heads or dim % 4:
            raise ValueError(
                f"decoder_dim {dim} must be divisible by 4 and by decoder_heads {heads}, and decoder_depth {depth} at "
                "least 1"
            )
        self.fusion = MultiScaleFusion(encoder.scales, encoder.embed_dim) if encoder.scales else None
        self.decoder = None
        if self.mim_target is not None:
            self.decoder = ReconstructionDecoder(
                encoder.embed_dim,
                encoder.grid,
                dim=dim,
                depth=depth,
                num_heads=heads,
                mlp_ratio=decoder_mlp_ratio or encoder.decoder_mlp_ratio,
                out_dim=self.mim_target.dim,
                num_prefix_tokens=encoder.num_prefix_tokens,
            )
        self.distillation = None
        if self.vis_target is not None:
            self.distillation = DistillationHead(encoder.embed_dim, dim, self.vis_target.dim, projector_depth)

    @property
    def mim_target(self) -> Target | None:
        """Target of the reconstruction branch, None where that is off."""
        return self.branch_targets["mim"] if self.mim else None  # type: ignore[return-value]

    @property
    def vis_target(self) -> Target | None:
        """Target of the distillation branch, None where that is off."""
        if not self.vis:
            return None
        return self.branch_targets["vis" if "vis" in self.branch_targets else "mim"]  # type: ignore[return-value]

    def _target(self, target: str | Target, hog_cell: int | None) -> Target:
        return create_target(target, self.encoder, hog_cell=hog_cell)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks' activations again in the backward pass, in encoder and decoder: less memory, slower."""
        set_checkpointing(self, enable)

    def draw_masks(self, keys: Tensor) -> Masks:
        """Masks of the model's own settings, a pure function of the image keys [B] int64."""
        return disjoint_masks(
            keys.shape[0],
            self.encoder.grid,
            self.num_views,
            self.mask_ratio,
            self.pred_ratio,
            self.block_size,
            self.disjoint,
            keys=keys,
        )

    def encode(self, normalized: Tensor, visible: Tensor) -> Tensor:
        """Latent tokens of all views: images [B, c, H, W], ids [K, B, V] -> [R, prefix + V, D].

        Multi-scale fusion and the last norm belong to pre-training only; the encoder itself runs as it does downstream.
        """
        x, stages = self.encoder.forward_stages(normalized, visible.flatten(0, 1))  # R, prefix + V, D
        if self.fusion is not None:
            x = x + self.fusion(stages)  # R, V, D (such encoders have no prefix)
        return self.encoder.norm(x)

    def predict(self, normalized: Tensor, masks: Masks) -> dict[str, Tensor]:
        """What each branch says of its own tokens.

        Returns:
            "mim": [R, M, C] in the order of ``masks.masked``; "vis": [R, V, C] in the order of ``masks.visible``.
        """
        return self.branches(self.encode(normalized, masks.visible), masks)

    def branches(self, latent: Tensor, masks: Masks) -> dict[str, Tensor]:
        """Predictions of :meth:`predict` from the latent tokens [R, prefix + V, D] of :meth:`encode`."""
        predictions = {}
        if self.decoder is not None:
            predictions["mim"] = self.decoder(latent, masks.visible.flatten(0, 1), masks.masked.flatten(0, 1))
        if self.distillation is not None:
            predictions["vis"] = self.distillation(latent[:, self.encoder.num_prefix_tokens :])
        return predictions

    @torch.no_grad()
    def targets(self, normalized: Tensor, raw: Tensor) -> dict[str, Tensor]:
        """Targets of the branches that are on, once per image: [B, N, C] float32 each."""
        device = normalized.device.type
        reduced, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        targets = {}
        for branch, target in self.branch_targets.items():
            with torch.autocast(device, dtype=dtype, enabled=reduced and bool(target.autocast)):
                targets[branch] = target(normalized, raw)
        return targets | ({"vis": targets["mim"]} if self.vis and "vis" not in targets else {})

    def forward(
        self,
        images_normalized: Tensor,
        images_0_255: Tensor,
        masks: Masks | None = None,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One pass: loss = mim + theta * vis.

        Args:
            images_normalized: [B, c, H, W], the encoder's input.
            images_0_255: [B, c, H, W], the same images on the 0..255 scale (HOG is taken from these).
            masks: the caller's own masks, of any K; they override the model's.
            keys: [B] int64, from which the model draws its masks; None = from torch's random state.

        Returns:
            {"loss", "mim", "vis"}: scalars; a branch that is off has no entry. Besides, what targets say of themselves.
        """
        if masks is None:
            masks = self._fresh_masks(images_normalized, keys)
        self._check_sizes(images_normalized, images_0_255, masks)
        targets = self.targets(images_normalized, images_0_255)
        masks = masks.asked(self.decode_ratio)
        out = self.losses(self.predict(images_normalized, masks), targets, masks)
        for branch, target in self.branch_targets.items():
            out |= target.scalars(targets[branch])  # type: ignore[operator]
        return out

    def losses(self, predictions: dict[str, Tensor], targets: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
        """What :meth:`forward` returns, from :meth:`predict` and :meth:`targets`.

        Both branches pick their targets by the very ids they predicted. The published code compares the visible
        branch's shuffled tokens with targets in raster order.
        """
        losses: dict[str, Tensor] = {}
        for branch, kind, ids in (("mim", self.mim_loss, masks.masked), ("vis", self.vis_loss, masks.visible)):
            if branch in predictions:
                target = gather_views(targets[branch], ids.flatten(0, 1))  # R, M or V, C
                losses[branch] = regression_loss(kind, predictions[branch], target)
        nothing = torch.zeros((), device=masks.visible.device)
        loss = losses.get("mim", nothing) + self.theta * losses.get("vis", nothing)
        return {"loss": loss, **losses}

    def _check_sizes(self, images: Tensor, raw: Tensor, masks: Masks) -> None:
        """Masks, both forms of the images and the decoder's grid must agree: a larger image would be cut unnoticed."""
        expected = (masks.visible.shape[1], self.encoder.in_chans, *self.encoder.img_size)
        if masks.mask.shape[-1] != self.encoder.num_patches:
            raise ValueError(f"masks are for {masks.mask.shape[-1]} tokens, the model has {self.encoder.num_patches}")
        for name, got in (("images_normalized", images.shape), ("images_0_255", raw.shape)):
            if tuple(got) != expected:
                raise ValueError(f"{name} must be {list(expected)} for these masks and this model, got {list(got)}")

    def _fresh_masks(self, images: Tensor, keys: Tensor | None) -> Masks:
        if keys is None:
            keys = torch.randint(-(2**63), 2**63 - 1, (images.shape[0],))
        return self.draw_masks(keys.to(images.device))

    def after_step(self, step: int, progress: float = 0.0) -> None:
        """Let the targets follow the encoder after optimizer step ``step``, at ``progress`` of the run (0 to 1)."""
        for target in self.branch_targets.values():
            target.after_step(self.encoder, step, progress)  # type: ignore[operator]

    def flops(self) -> int:
        """Floating-point operations of one forward pass of one unique image with its K views; training takes 3 x."""
        visible, masked, _ = self.counts
        view = self.encoder.flops(visible)
        for part in (self.fusion, self.distillation):
            view += part.flops(visible) if part is not None else 0
        if self.decoder is not None:
            view += self.decoder.flops(visible, asked_count(masked, self.decode_ratio))
        return self.num_views * view
