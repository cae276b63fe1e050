"""Models of other libraries for the speed comparisons, in their default form.

All take normalized images.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmjd
from dmjd.encoders.conv_vit import CELLS, ConvViT
from dmjd.nn.layers import TransformerBlock
from dmjd.nn.recompute import attention
from dmjd.nn.tokens import gather_tokens

IMG_SIZE = 224


class DenseReference(nn.Module):
    """DMJD with ConvViT as in the published code: all positions are computed in both views, then selected.

    Each view embeds and convolves the whole masked image, the scales are fused densely, and the decoder and its head
    run on all tokens. Weights, attention kernel, targets and precision are ours. Channels are last throughout, which is
    faster than the published layout. Activations are kept for the backward pass as by plain layers, except that GELU
    is recomputed: slightly less memory than the published code.
    """

    def __init__(self, model: dmjd.MaskedImageModel) -> None:
        super().__init__()
        self.model = model
        for block in model.modules():
            if isinstance(block, TransformerBlock):
                block.forward = partial(_plain_block, block)

    def forward(self, images: Tensor, raw: Tensor, keys: Tensor) -> Tensor:
        """[B, 3, H, W] normalized and on the 0..255 scale, [B] keys -> loss."""
        model = self.model
        masks = model.draw_masks(keys)
        targets = model.targets(images, raw)
        losses = []
        for visible, masked, mask in zip(masks.visible, masks.masked, masks.mask, strict=True):
            latent = self._encode(images, visible, mask)
            everything = model.branches["mim"].decoder(latent, visible, masked, all_tokens=True)  # B, V + M, C
            prediction = everything[:, visible.shape[1] :].float()
            losses.append(F.mse_loss(prediction, gather_tokens(targets["mim"], masked)))
            distilled = model.branches["vis"](latent, masks).float()
            losses.append(F.smooth_l1_loss(distilled, gather_tokens(targets["vis"], visible), beta=2.0))
        return torch.stack(losses).sum() / len(masks.visible)

    def _encode(self, images: Tensor, visible: Tensor, mask: Tensor) -> Tensor:
        encoder = self.model.encoder
        assert isinstance(encoder, ConvViT)
        h, w = encoder.grid
        x, fused = images.permute(0, 2, 3, 1), 0
        stages = (
            (encoder.patch_embed1, encoder.blocks1, CELLS[0], self.model.fusion.convs[0]),
            (encoder.patch_embed2, encoder.blocks2, CELLS[1], self.model.fusion.convs[1]),
        )
        for embed, blocks, cells, fusion in stages:
            x = embed(x)  # B, h*s, w*s, d
            keep = (~mask).view(-1, h, w, 1).repeat_interleave(cells, 1).repeat_interleave(cells, 2)
            for block in blocks:
                y = block.conv1(block.norm1(x)) * keep
                x = x + block.conv2(block.dwconv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
                x = x + _plain_mlp(block.mlp, block.norm2(x))
            fused = fused + fusion(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)  # B, N, D
        tokens = encoder.patch_embed3(x).flatten(1, 2)  # B, N, D
        x = encoder.patch_embed4(tokens) + encoder.pos_embed
        x = gather_tokens(x, visible)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x + gather_tokens(fused, visible))


def _plain_block(block: TransformerBlock, x: Tensor, skip: int = 0) -> Tensor:
    assert not skip
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
    x = x + block.attn.proj(attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2))
    return x + _plain_mlp(block.mlp, block.norm2(x))


def _plain_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    x = mlp.fc1(x)
    return _GeluLinear.apply(x, mlp.fc2.weight.to(x.dtype), mlp.fc2.bias.to(x.dtype))


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)) that saves only x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward((rows @ weight).view_as(x), x)
        return grad_x, rows.t() @ F.gelu(x).flatten(0, -2), rows.sum(0)


class LightlyMAE(nn.Module):
    """MAE from lightly's building blocks, as in its documentation, but with ViT-B/16 instead of B/32."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.models.modules import masked_autoencoder_timm, masked_vision_transformer_timm
        from timm.models.vision_transformer import vit_base_patch16_224

        vit = vit_base_patch16_224()
        self.backbone = masked_vision_transformer_timm.MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = masked_autoencoder_timm.MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=16,
            embed_dim=vit.embed_dim,
            decoder_embed_dim=512,
            decoder_depth=8,
            decoder_num_heads=16,
            mlp_ratio=4.0,
            mask_token=nn.Parameter(torch.zeros(1, 1, 512)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> loss, on normalized pixels."""
        from lightly.models import utils

        B, length = images.shape[0], self.backbone.sequence_length
        keep, masked = utils.random_token_mask(size=(B, length), mask_ratio=0.75, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (B, length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, 16), masked - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(predicted.float(), target)


def hugging_face_mae(**sizes: Any) -> nn.Module:
    """ViTMAEForPreTraining of transformers in MAE's configuration: ViT-B/16, decoder 512 x 8, normalized pixels."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, mask_ratio=0.75, **sizes))

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).loss

    return Loss()


def dmjd_model() -> dmjd.MaskedImageModel:
    """ConvViT-B in the paper's configuration: two disjoint views, c = 0.6, HOG, 8 decoder blocks of MLP ratio 8."""
    return dmjd.MaskedImageModel(dmjd.create_encoder("conv_vit_base_patch16", img_size=IMG_SIZE))


def mae_model() -> dmjd.MaskedImageModel:
    """Our ViT-B in MAE's configuration."""
    encoder = dmjd.create_encoder("vit_base_patch16", img_size=IMG_SIZE, class_token=True)
    masks = dmjd.DisjointMasks(num_views=1, mask_ratio=0.75, block_size=1)
    return dmjd.MaskedImageModel(encoder, masks, mim=dmjd.Reconstruction(target="pixel"), vis=None)
