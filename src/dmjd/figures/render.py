"""Rendering of tensors as RGB images: images, masked images and target features.

Shapes: B image, N token, C target channel, H, W image, h, w token grid. RGB images are [B, H, W, 3] in 0..1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.nn.tokens import patchify, unpatchify
from dmjd.targets.base import Target
from dmjd.targets.hog import HogTarget
from dmjd.targets.pixel import PixelTarget

GRAY = 0.55  # brightness of masked tokens

TRUE_TINT = (0.25, 0.45, 0.9)  # color of true tokens among predictions

MASKED_OFTEN = (0.05, 0.15, 0.4)  # color of a token masked in every view, in a map of counts

_COLOR_DIM = 0.6  # brightness of the colors of cells behind HOG glyphs

_GLYPHS_SIDE = 448  # pixels of an image of HOG glyphs, approximately; a panel of a figure has fewer

# Maps target tokens [B, N, C], true or predicted, to RGB images.
Renderer = Callable[[Tensor], Tensor]


def to_rgb(images_0_255: Tensor) -> Tensor:
    """Images [B, c, H, W] of any number type on the 0..255 scale -> RGB [B, H, W, 3].

    The first three channels are taken as red, green and blue; of one or two channels the first is shown in gray.
    Invalid pixels, which are NaN, are gray.
    """
    return (_three(images_0_255.float()) / 255).nan_to_num(GRAY).clamp(0, 1).permute(0, 2, 3, 1)


def _three(x: Tensor) -> Tensor:
    """[B, c, ...] -> [B, 3, ...] by the rule of :func:`to_rgb`."""
    return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, *x.shape[2:])


def upsample(tokens: Tensor, grid: tuple[int, int], rgb: Tensor) -> Tensor:
    """One value per token, [B, N] -> one per pixel, [B, H, W], for images [B, H, W, 3]; nearest neighbor."""
    _, H, W, _ = rgb.shape
    rows = torch.arange(H, device=tokens.device) * grid[0] // H
    columns = torch.arange(W, device=tokens.device) * grid[1] // W
    return tokens.unflatten(1, grid)[:, rows][:, :, columns]


def gray_out(rgb: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replace the masked tokens, [B, N] bool, of RGB images with gray."""
    return torch.where(upsample(masked, grid, rgb).unsqueeze(-1), GRAY, rgb)


def tint(rgb: Tensor, selected: Tensor, grid: tuple[int, int]) -> Tensor:
    """Recolor the selected tokens, [B, N] bool, of white-on-black RGB images in dim blue."""
    dim = rgb.mean(-1, keepdim=True) * rgb.new_tensor(TRUE_TINT)
    return torch.where(upsample(selected, grid, rgb).unsqueeze(-1), dim, rgb)


def hog_glyphs(weights: Tensor, side: int) -> Tensor:
    """Draw histograms of gradient orientation as stars of strokes, each along the edge of its bin.

    Args:
        weights: [..., rows, columns, bins], the brightness of each stroke, clipped to 0..1. Bin b holds unsigned
            gradients from b to b + 1 times 180 / bins degrees, measured from rightward to downward. An edge is
            perpendicular to its gradient, so bin 0 is a vertical stroke, to within one bin.
        side: pixels of a cell.

    Returns:
        [..., rows * side, columns * side] in 0..1; where strokes cross, the brighter one is visible.
    """
    rows, columns, bins = weights.shape[-3:]
    strokes = _strokes(bins, side).to(weights.device)  # bins, side, side
    canvas = weights.new_zeros(*weights.shape[:-3], rows, side, columns, side)
    for weight, stroke in zip(weights.clamp(0, 1).unbind(-1), strokes, strict=True):
        canvas = torch.maximum(canvas, weight[..., :, None, :, None] * stroke[:, None, :])
    return canvas.flatten(-4, -3).flatten(-2, -1)


def _strokes(bins: int, side: int) -> Tensor:
    """One antialiased stroke through the middle of a cell for each orientation: [bins, side, side] in 0..1."""
    gradient = (torch.arange(bins) + 0.5) * math.pi / bins
    cos, sin = gradient.cos().view(-1, 1, 1), gradient.sin().view(-1, 1, 1)
    offset = torch.arange(side) - (side - 1) / 2
    row, column = offset.view(1, -1, 1), offset.view(1, 1, -1)
    across = (column * cos + row * sin).abs()  # distance from the edge's line
    along = (row * cos - column * sin).abs()
    half_width, half_length = max(0.5, side / 24), (side - 1) / 2
    return (half_width + 0.5 - across).clamp(0, 1) * (half_length + 0.5 - along).clamp(0, 1)


def renderer_for(target: Target, encoder: Encoder, images_0_255: Tensor, truth: Tensor) -> Renderer:
    """The renderer of a target.

    Args:
        target: HOG is drawn as glyphs, pixels as an image, any other target as its first three principal components.
        encoder: provides grid, patch size and preprocessing.
        images_0_255: [B, c, H, W] images.
        truth: [b, N, C], the targets of these images or, for the components, of
            more.

    Returns:
        A function from tokens [B, N, C] of these images to RGB.
    """
    if isinstance(target, HogTarget):
        return lambda tokens: render_hog(tokens, target, encoder)
    if isinstance(target, PixelTarget):
        return lambda tokens: render_pixels(tokens, encoder, images_0_255)
    return component_renderer(truth, encoder.grid)


def render_hog(tokens: Tensor, target: HogTarget, encoder: Encoder) -> Tensor:
    """Render HOG tokens [B, N, C] as glyphs on black or, dimmed, on the colors of the cells if the target has them;
    color channels in their colors.

    Only positive whitened values are drawn. Brightness is their square root, so that small predictions stay visible;
    it is 1 for the value of a cell whose gradients all lie in one bin.
    """
    grid, s = encoder.grid, target.cells
    x = _cells(tokens[..., : target.edges_dim], grid, s, target.num_bins)
    side = min(48, max(12, _GLYPHS_SIDE // (s * max(grid)))) | 1  # odd, so that strokes have a center row
    brightest = math.sqrt(max(1, target.num_bins - 1))
    glyphs = hog_glyphs((_three(x) / brightest).clamp(min=0).sqrt(), side).permute(0, 2, 3, 1)
    if not target.color:
        return glyphs
    means = _cells(tokens[..., target.edges_dim :], grid, s, 1)[..., 0]  # B, c, rows, columns
    colors = to_rgb(known_preprocess(encoder).denormalize(means)).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return torch.maximum(glyphs, _COLOR_DIM * colors)


def _cells(tokens: Tensor, grid: tuple[int, int], s: int, bins: int) -> Tensor:
    """HOG tokens [B, N, s * s * bins * c] -> [B, c, h * s, w * s, bins]."""
    x = (
        tokens.float().reshape(len(tokens), *grid, s, s, bins, -1).permute(0, 6, 1, 3, 2, 4, 5)
    )  # B, c, h, s, w, s, bins
    return x.reshape(len(tokens), -1, grid[0] * s, grid[1] * s, bins)


def render_pixels(tokens: Tensor, encoder: Encoder, images_0_255: Tensor) -> Tensor:
    """Render normalized-pixel tokens [B, N, C] as images, with the true mean and standard deviation of each patch."""
    preprocess = known_preprocess(encoder)
    patches = patchify(preprocess.normalize(images_0_255), encoder.patch_size)  # B, N, P*P*c
    mean, std = PixelTarget.patch_statistics(patches)  # B, N, 1 each
    images = unpatchify(tokens.float() * std + mean, encoder.grid, encoder.patch_size)  # B, c, H, W normalized
    return to_rgb(preprocess.denormalize(images))


def heat_map(rgb: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Draw a heat map of token values [B, N] over dimmed gray images [B, H, W, 3]; each image has its own scale.

    The values are interpolated between token centers, so that block edges do not cover the image.
    """
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    shares = ((values - low) / (high - low).clamp(min=1e-12)).unflatten(1, grid).unsqueeze(1)  # B, 1, h, w
    heat = F.interpolate(shares, size=rgb.shape[1:3], mode="bilinear").squeeze(1)  # B, H, W
    colors = torch.from_numpy(colormaps["plasma"](heat.cpu().numpy())[..., :3]).to(rgb)
    return torch.lerp(0.75 * rgb.mean(-1, keepdim=True), colors, 0.85 * heat.unsqueeze(-1))


def component_colors(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Render tokens [B, N, D] with the :func:`component_renderer` of the same tokens: [B, h, w, 3]."""
    return component_renderer(tokens, grid)(tokens)


def component_renderer(truth: Tensor, grid: tuple[int, int]) -> Renderer:
    """Renders the first three principal components of the tokens of all images as red, green and blue.

    Tokens of encoders trained by masking encode much of their position, which would color every image with the same
    gradient: with several images, the mean token of each position is subtracted first.

    Args:
        truth: [B, N, D]; mean, components and range are computed from it.
        grid: (h, w).

    Returns:
        A function from tokens [b, N, D] of any images to [b, h, w, 3].
    """
    truth = truth.float()
    mean = truth.mean(dim=0 if len(truth) > 1 else 1, keepdim=True)  # 1, N, D or 1, 1, D
    rows = (truth - mean).flatten(0, 1)
    basis = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(-1)[:, :3]  # D, 3; fewer for D < 3
    scale = 4 * (rows @ basis).std(dim=0) + 1e-6  # +- 2 standard deviations fill 0..1

    def render(tokens: Tensor) -> Tensor:
        colors = ((tokens.float() - mean) @ basis) / scale + 0.5  # b, N, 3
        return _three(colors.clamp(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(1, grid)

    return render
