"""The method, top to bottom (DMJD, section III): masks -> K views -> one encoder -> two branches -> loss.

Shapes: B image, K view, R = K * B rows (view-major), N token, V visible, M masked, D width, C target entries.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dmjd.branches import Branch, Distillation, MultiScaleFusion, Reconstruction
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.published import FORMER_KEYS
from dmjd.images.invalid import valid_tokens
from dmjd.masking import DisjointMasks, Masks, MaskSampler, random_keys
from dmjd.nn.dropout import set_row_keys
from dmjd.nn.layers import set_checkpointing
from dmjd.nn.modes import own_defaults
from dmjd.rng import STREAM_VIEW, hash64
from dmjd.targets.base import Target
from dmjd.targets.registry import create_target


class MaskedImageModel(nn.Module):
    """Disjoint masking with joint distillation around any encoder.

    Example::

        model = MaskedImageModel(
            encoder,
            masks=DisjointMasks(num_views=2, mask_ratio=0.6),
            mim=Reconstruction(target="hog"),
            vis=Distillation(target="hog", theta=1.0),
        )
        model(images_normalized, images_0_255)["loss"].backward()

    Args:
        encoder: the encoder to pre-train.
        masks: draws the masks of the views; any :class:`~dmjd.masking.MaskSampler`.
        mim: settings of the branch on masked tokens; None = the branch is not built.
        vis: settings of the branch on visible tokens; None = the branch is not built.

    Raises:
        ValueError: for settings that do not fit together or do not fit the encoder.
    """

    @own_defaults(callers_device=True)
    def __init__(
        self,
        encoder: Encoder,
        masks: MaskSampler | None = None,
        mim: Reconstruction | None = Reconstruction(),  # noqa: B008, it is frozen
        vis: Distillation | None = Distillation(),  # noqa: B008, it is frozen
        **former: Any,
    ) -> None:
        super().__init__()
        masks = DisjointMasks() if masks is None else masks
        _check_arguments(masks, mim, vis, former)
        self.encoder = encoder
        self.masks = masks
        self.counts = masks.counts(encoder.grid)  # tokens visible, masked, masked in at least one view
        settings = {name: one for name, one in (("mim", mim), ("vis", vis)) if one is not None}
        # Branch -> key of its target in branch_targets. A target that branches share is held, saved and computed once.
        self.target_keys: dict[str, str] = {}
        self.branch_targets = nn.ModuleDict()
        for name, own in settings.items():
            shared = [key for key in self.branch_targets if settings[key].target == own.target]
            self.target_keys[name] = shared[0] if shared else name
            if not shared:
                self.branch_targets[name] = create_target(own.target, encoder)
        self.fusion = MultiScaleFusion(encoder.scales, encoder.embed_dim) if encoder.scales else None
        self.branches = nn.ModuleDict(
            {name: own.build(encoder, self.target(name).dim) for name, own in settings.items()}
        )
        self.register_load_state_dict_pre_hook(_rename_former_keys)

    def target(self, branch: str) -> Target:
        """The target of a branch, "mim" or "vis"."""
        target = self.branch_targets[self.target_keys[branch]]
        assert isinstance(target, Target)
        return target

    def _named_branches(self) -> list[tuple[str, Branch]]:
        return list(self.branches.items())  # type: ignore[arg-type]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of encoder and decoder blocks in the backward pass: less memory, slower."""
        set_checkpointing(self, enable)

    def draw_masks(self, keys: Tensor) -> Masks:
        """Masks of K views of each image, a pure function of the image keys [B] int64."""
        if keys.dim() != 1 or keys.dtype != torch.int64:
            raise ValueError(f"keys must be [B] int64, one for each image, got {list(keys.shape)} {keys.dtype}")
        return self.masks.draw(keys, self.encoder.grid)

    def encode(self, normalized: Tensor, visible: Tensor) -> Tensor:
        """Latent tokens of all views: images [B, c, H, W], ids [K, B, V] -> [R, prefix + V, D].

        Multi-scale fusion and the final norm belong to pre-training only; downstream the encoder runs without them.
        """
        x, stages = self.encoder.forward_stages(normalized, visible.flatten(0, 1))  # R, prefix + V, D
        if self.fusion is not None:
            x = x + self.fusion(stages)  # R, V, D (encoders with stages have no prefix)
        return self.encoder.norm(x)

    @property
    def _knows_invalid(self) -> bool:
        """Whether the encoder's preprocessing knows invalid pixels."""
        return self.encoder.preprocess is not None and self.encoder.preprocess.invalid is not None

    def _valid_pixels(self, raw: Tensor) -> Tensor | None:
        """The pixels that mean something, [B, c, H, W] bool; None if all do: 8-bit images hold no NaN."""
        return ~raw.isnan() if self._knows_invalid and raw.is_floating_point() else None

    def valid_tokens(self, raw: Tensor) -> Tensor | None:
        """The tokens of images [B, c, H, W] on the 0..255 scale that have a loss: [B, N] bool; None: all."""
        pixels = self._valid_pixels(raw)
        return None if pixels is None else valid_tokens(pixels, self.encoder.patch_size)

    @torch.no_grad()
    def targets(self, normalized: Tensor, raw: Tensor) -> dict[str, Tensor]:
        """Targets of each branch, computed once per image: [B, N, C] float32 each."""
        device, valid = normalized.device.type, self._valid_pixels(raw)
        if valid is not None:
            raw = known_preprocess(self.encoder).filled(raw)
        reduced, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        computed = {}
        for key, target in self.branch_targets.items():
            with torch.autocast(device, dtype=dtype, enabled=reduced and bool(target.autocast)):
                if valid is None:
                    computed[key] = target(normalized, raw)
                else:
                    computed[key] = self.target(key).of_valid(normalized, raw, valid)
        return {name: computed[key] for name, key in self.target_keys.items()}

    def predict(self, normalized: Tensor, masks: Masks) -> dict[str, Tensor]:
        """Predictions of each branch for all of its tokens.

        Returns:
            "mim": [R, M, C] in the order of ``masks.masked``; "vis": [R, V, C] in the order of ``masks.visible``.
        """
        latent = self.encode(normalized, masks.visible)  # R, prefix + V, D
        return {name: branch(latent, masks) for name, branch in self._named_branches()}

    def losses(
        self, latent: Tensor, targets: dict[str, Tensor], masks: Masks, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of each branch from the latent tokens of :meth:`encode`, and their weighted sum "loss".

        Only tokens that are ``valid`` ([B, N] bool; None: all) have a loss.
        """
        losses: dict[str, Tensor] = {}
        loss = torch.zeros((), dtype=torch.float32, device=latent.device)
        for name, branch in self._named_branches():
            own = branch.train_masks(masks)
            losses[name] = branch.loss(branch(latent, own), targets[name], own, valid)
            loss = loss + branch.weight * losses[name]
        return {"loss": loss, **losses}

    def forward(
        self,
        images_normalized: Tensor,
        images_0_255: Tensor,
        masks: Masks | None = None,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One training pass: loss = mim + theta * vis.

        Args:
            images_normalized: [B, c, H, W], the encoder's input.
            images_0_255: [B, c, H, W], the same images on the 0..255 scale (HOG is computed from these). If the
                encoder's preprocessing knows invalid pixels, these are NaN; tokens with less than half of valid values
                have no loss.
            masks: masks for these images, with any K; None = the model draws them.
            keys: [B] int64, from which the model draws stochastic depth and, without ``masks``, the masks; None =
                random keys.

        Returns:
            {"loss", "mim", "vis"}: scalars; a branch that is off has no entry. Targets may add scalars of their own;
            images with invalid pixels "valid_tokens", the fraction of the tokens that have a loss.
        """
        if masks is None:
            keys = random_keys(images_normalized.shape[0]) if keys is None else keys
            masks = self.draw_masks(keys.to(images_normalized.device))
        self._check_sizes(images_normalized, images_0_255, masks)
        targets = self.targets(images_normalized, images_0_255)
        if keys is not None:
            set_row_keys(self.encoder, _row_keys(keys.to(images_normalized.device), masks.visible.shape[0]))
        latent = self.encode(images_normalized, masks.visible)
        valid = self.valid_tokens(images_0_255)
        out = self.losses(latent, targets, masks, valid)
        if self._knows_invalid:
            out["valid_tokens"] = torch.ones_like(out["loss"]) if valid is None else valid.float().mean()
        for key in self.branch_targets:
            out |= self.target(key).scalars(targets[key])
        return out

    def _check_sizes(self, images: Tensor, raw: Tensor, masks: Masks) -> None:
        """Check that the masks and both forms of the images fit the model and each other."""
        if not masks.visible.shape[1]:
            raise ValueError("the batch holds no image, so it has no loss")
        expected = (masks.visible.shape[1], self.encoder.in_chans, *self.encoder.img_size)
        if masks.mask.shape[-1] != self.encoder.num_patches:
            raise ValueError(f"masks are for {masks.mask.shape[-1]} tokens, the model has {self.encoder.num_patches}")
        for name, got in (("images_normalized", images.shape), ("images_0_255", raw.shape)):
            if tuple(got) != expected:
                raise ValueError(f"{name} must be {list(expected)} for these masks and this model, got {list(got)}")

    def after_step(self, step: int, progress: float = 0.0) -> None:
        """Update targets that follow the encoder after optimizer step ``step``, at ``progress`` of the run (0 to 1)."""
        for key in self.branch_targets:
            self.target(key).after_step(self.encoder, step, progress)

    def flops(self) -> int:
        """Floating-point operations of one forward pass of one image with its K views; training takes 3 times that."""
        visible, masked, _ = self.counts
        view = self.encoder.flops(visible)
        view += self.fusion.flops(visible) if self.fusion is not None else 0
        view += sum(branch.flops(visible, masked) for _, branch in self._named_branches())
        return self.masks.num_views * view


def _row_keys(keys: Tensor, num_views: int) -> Tensor:
    """Keys of the images [B] -> keys of the rows [K * B], view-major."""
    return hash64(STREAM_VIEW, keys, torch.arange(num_views, device=keys.device)[:, None]).flatten()


def _check_arguments(masks: Any, mim: Any, vis: Any, former: dict[str, Any]) -> None:
    """Raise one error for arguments of version 0.1, which shows how to write them now."""
    wrong = list(former)
    wrong += ["masks"] if not isinstance(masks, MaskSampler) else []
    wrong += ["mim"] if not isinstance(mim, Reconstruction | None) else []
    wrong += ["vis"] if not isinstance(vis, Distillation | None) else []
    if wrong:
        raise ValueError(
            f"MaskedImageModel does not take {', '.join(wrong)} like this. Write MaskedImageModel(encoder, "
            'masks=DisjointMasks(num_views=2, mask_ratio=0.6), mim=Reconstruction(target="hog"), '
            'vis=Distillation(target="hog", theta=1.0)); None in place of a branch leaves it out'
        )
    if mim is None and vis is None:
        raise ValueError("both branches are off: leave mim or vis on")


def _rename_former_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of a version 0.1 checkpoint, in place."""
    for key in list(state_dict):
        for former, ours in FORMER_KEYS.items():
            if key.startswith(prefix + former):
                state_dict[prefix + ours + key[len(prefix + former) :]] = state_dict.pop(key)
