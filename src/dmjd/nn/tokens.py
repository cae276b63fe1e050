"""Pure functions on tokens: patches, positions, gathering by id.

Shape legend of the whole package: B image, K view, N token, V visible, M masked, D width, C channel or target entry,
H, W image sides, h, w grid sides, P patch side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, h*P, w*P] -> [B, h*w, P*P*C], raster order; entries in the order (row, column, channel)."""
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"image of {H} x {W} pixels is not divisible into patches of {P} x {P}")
    x = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)  # B, h, w, P, P, C
    return x.reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of :func:`patchify`: [B, h*w, P*P*C] -> [B, C, h*P, w*P]."""
    B, N, E = patches.shape
    (h, w), P = grid, patch_size
    if h * w != N or E % (P * P):
        raise ValueError(f"{N} patches of {E} values do not form a {h} x {w} grid of {P} x {P}-pixel patches")
    x = patches.reshape(B, h, w, P, P, E // (P * P)).permute(0, 5, 1, 3, 2, 4)  # B, C, h, P, w, P
    return x.reshape(B, -1, h * P, w * P)


def sincos_positions(
    dim: int, grid: tuple[int, int], num_prefix: int = 0, device: torch.device | None = None
) -> Tensor:
    """Fixed 2-D sine-cosine position table (MAE, He et al. 2022), computed in float64.

    The first half of the channels encodes the column, the second half the row; each half is [sin..., cos...] with
    frequencies 10000^(-i / (dim / 4)). ``device`` None is torch's default device.

    Returns:
        [1, num_prefix + h*w, dim] float32; prefix positions are zero.

    Raises:
        ValueError: if ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {dim}")
    h, w = grid
    device = torch.get_default_device() if device is None else device
    if device.type == "meta":  # only the shapes of a model are wanted
        return torch.empty(1, num_prefix + h * w, dim, device=device)
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(h, dtype=np.float64), np.arange(w, dtype=np.float64), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # N, D/4 each
    table = np.concatenate([part for a in angles for part in (np.sin(a), np.cos(a))], axis=1)  # N, D
    table = np.concatenate([np.zeros((num_prefix, dim)), table])
    return torch.from_numpy(table).float().unsqueeze(0).to(device)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens by id: x [B, N, D], ids [B, V] int64 -> [B, V, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def gather_positions(table: Tensor, ids: Tensor | None) -> Tensor:
    """Positions of the visible tokens: table [1, N, D], ids [R, V] int64 -> [R, V, D]; the whole table for None."""
    return table if ids is None else gather_tokens(table.expand(ids.shape[0], -1, -1), ids)


def gather_views(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens for all views of each image: x [B, N, D], ids [R, V] with R = K * B, view-major -> [R, V, D]."""
    image = torch.arange(ids.shape[0], device=ids.device) % x.shape[0]  # R
    return x[image.unsqueeze(1), ids]


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table by 2-D bicubic interpolation, as timm does.

    Args:
        table: [1, prefix + h*w, D] for any number of prefix tokens, whose positions are kept.
        old, new: (h, w) of the table and of the result.

    Returns:
        [1, prefix + h'*w', D] of the same dtype.
    """
    prefix = table.shape[1] - old[0] * old[1]
    cells = table[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2).float()  # 1, D, h, w
    cells = F.interpolate(cells, size=new, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :prefix], cells.to(table.dtype)], dim=1)
