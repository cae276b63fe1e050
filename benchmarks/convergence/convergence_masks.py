"""Masks that the library does not have.

Shapes: K view, B image, N token, V visible token.
"""

import dataclasses

import torch
from torch import Tensor

from dmjd.masking import Masks, MaskSampler
from dmjd.rng import hash64


class ShuffledVisible(MaskSampler):
    """The masks of another sampler with the visible tokens of each view in random order, as published."""

    def __init__(self, sampler: MaskSampler) -> None:
        self.sampler, self.num_views = sampler, sampler.num_views
        self.mask_ratio, self.pred_ratio = sampler.mask_ratio, sampler.pred_ratio

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """(V, M, U) in tokens."""
        return self.sampler.counts(grid)

    def draw(self, keys: Tensor, grid: tuple[int, int]) -> Masks:
        """Draw K views of each image: keys [B] int64 -> masks."""
        masks = self.sampler.draw(keys, grid)
        K, B, V = masks.visible.shape
        views, positions = (torch.arange(n, device=keys.device) for n in (K, V))
        noise = hash64(0, keys.view(1, B, 1), views.view(K, 1, 1), positions)  # K, B, V
        return dataclasses.replace(masks, visible=masks.visible.gather(2, noise.argsort(dim=-1)))


class Windows(ShuffledVisible):
    """As many visible tokens as another sampler has, in one window that is rolled around the edges of the image.

    Inverse block masking with roll (CAPI, Darcet et al. 2025). A window has a random number of rows, from half to twice
    the side of a square; its last row may be shorter. The windows of further views lie a K-th of the rows and columns
    further on, so they overlap less than independent ones.
    """

    def draw(self, keys: Tensor, grid: tuple[int, int]) -> Masks:
        """Draw K views of each image: keys [B] int64 -> masks."""
        (h, w), K, B = grid, self.num_views, len(keys)
        V = self.counts(grid)[0]
        rows, top, left = (hash64(0, keys, part).remainder(1 << 20) for part in range(3))
        least, most = (min(h, max(1, round(factor * V**0.5))) for factor in (0.5, 2.0))
        rows = (least + rows % (most - least + 1)).clamp(min=-(-V // w))  # B
        columns = (V + rows - 1) // rows
        position = torch.arange(V, device=keys.device)
        view = torch.arange(K, device=keys.device).view(K, 1, 1)
        row = top.view(1, B, 1) + position // columns.view(1, B, 1) + view * h // K
        column = left.view(1, B, 1) + position % columns.view(1, B, 1) + view * w // K
        return Masks.from_visible((row % h * w + column % w).sort(dim=-1).values, h * w)
