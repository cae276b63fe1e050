"""HOG targets: histograms of oriented gradients, whitened (MaskFeat, Wei et al. 2022; DMJD's default)."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmjd.config.checks import MAX_SIDE, Bounds, check_int
from dmjd.config.tokens import default_cell
from dmjd.encoders.base import Encoder
from dmjd.targets.base import Target, TargetSettings, whiten

NUM_BINS = 9

MAX_BINS = 255  # their numbers are stored in 8 bits

# Pixels processed at a time: intermediate results fit into a CPU's cache, and memory stays small elsewhere.
_CPU_PIXELS, _DEVICE_PIXELS = 1 << 18, 1 << 25

# Size of the table of all gradients of uint8 images; with more bins than this, the table would be slower.
_TABLE_SIDE, _TABLE_BINS = 512, 32

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]  # images [..., H, W] -> differences along rows and columns


def hog(images_0_255: Tensor, cell_size: int = 8, num_bins: int = NUM_BINS, valid: Tensor | None = None) -> Tensor:
    """Histograms of unsigned gradient orientation for each channel, without block normalization or whitening.

    Gradients are centered differences, zero across the border. The magnitude of a pixel's gradient is added to the bin
    of its orientation (bins of 180 / num_bins degrees, no interpolation). A cell holds the sum over its pixels divided
    by their number.

    Args:
        images_0_255: [B, C, H, W] of any real number type, before normalization. Values must be finite. This is checked
            on the CPU alone, because a GPU would have to wait; there, a cell with NaN or infinity is NaN.
        cell_size: side of a cell in pixels; it must divide H and W.
        num_bins: orientations, 1 to 255.
        valid: [B, C, H, W] bool; an invalid pixel has no gradient, and neither has one whose difference needs one.
            None: all are valid.

    Returns:
        [B, C, H/cell, W/cell, bins] float32.

    Raises:
        ValueError: for images of another shape or type, values that are not finite, a cell that does not divide them,
            or another number of bins.
    """
    _check_images(images_0_255)
    H, W = images_0_255.shape[-2:]
    cell_size = check_int("cell_size", cell_size, Bounds(ge=1))
    num_bins = check_int("num_bins", num_bins, Bounds(ge=1, le=MAX_BINS))
    if valid is not None:
        images_0_255 = torch.where(valid, images_0_255.float(), torch.nan)
    gradient = _gradient if valid is None else _gradient_of_valid
    if H % cell_size or W % cell_size:
        raise ValueError(f"HOG cell of {cell_size} pixels does not divide the image of {H} x {W}")
    B, C = images_0_255.shape[:2]
    if min(images_0_255.shape) == 0:
        shape = (B, C, H // cell_size, W // cell_size, num_bins)
        return torch.zeros(shape, dtype=torch.float32, device=images_0_255.device)
    if images_0_255.device.type != "cpu" or torch.compiler.is_compiling():
        # In chunks, to bound the memory; one pooling pass per bin compiles to a single graph.
        chunks = images_0_255.split(max(1, _DEVICE_PIXELS // (C * H * W)))
        return torch.cat([_pooled(chunk.float(), cell_size, num_bins, gradient) for chunk in chunks])
    use_table = images_0_255.dtype == torch.uint8 and num_bins <= _TABLE_BINS
    row_sums = _row_sums_by_table if use_table else functools.partial(_row_sums, gradient=gradient)
    if (
        valid is None
        and images_0_255.dtype.is_floating_point
        and not bool(torch.stack(images_0_255.float().aminmax()).isfinite().all())
    ):
        raise ValueError("images_0_255 has values that are not finite (NaN, or infinite as float32)")
    out = torch.empty(B * C, H // cell_size, W // cell_size, num_bins, dtype=torch.float32, device="cpu")
    per_chunk = max(1, _CPU_PIXELS // (H * W))
    planes = images_0_255.reshape(B * C, H, W).contiguous()  # one channels-last image is reshaped to strided planes
    for chunk, part in zip(planes.split(per_chunk), out.split(per_chunk), strict=True):
        torch.sum(row_sums(chunk, cell_size, num_bins), dim=2, out=part)
        part.mul_(1 / cell_size**2)
    return out.view(B, C, H // cell_size, W // cell_size, num_bins)


def _check_images(images: Tensor) -> None:
    """Check that images are a dense [B, C, H, W] tensor of real numbers."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images_0_255 must be a [B, C, H, W] tensor, got {got}")
    if images.is_complex() or images.is_quantized or images.layout != torch.strided:
        raise ValueError(f"images_0_255 must be a dense tensor of real numbers, got {images.dtype}, {images.layout}")


def _row_sums_by_table(planes: Tensor, cell: int, num_bins: int) -> Tensor:
    """[b, H, W] uint8 -> [b, H/cell, cell, W/cell, bins]: histograms of the pixel rows of each cell, by table."""
    b, H, W = planes.shape
    x = planes.int()
    at = torch.empty_like(x)  # 512 * row difference + column difference
    at[:, :1], at[:, -1:] = 0, 0
    torch.sub(x[:, 2:], x[:, :-2], out=at[:, 1:-1])
    at[..., :: max(1, W - 1)].mul_(_TABLE_SIDE)  # the border has no column difference
    inner = at[..., 1:-1]
    torch.add(x[..., 2:], inner, alpha=_TABLE_SIDE, out=inner).sub_(x[..., :-2])
    sums = F.embedding_bag(at.abs_().view(-1, cell), _gradient_table(num_bins), mode="sum")
    return sums.view(b, H // cell, cell, W // cell, num_bins)


@functools.lru_cache(maxsize=2)
def _gradient_table(num_bins: int) -> Tensor:
    """Magnitudes of all gradients of uint8 images, in their bins: [256 * 512, bins] float32.

    Row |512 * row difference + column difference| holds the gradient's magnitude in its bin and zeros elsewhere. A
    gradient and its opposite share a row.
    """
    rows = torch.arange(_TABLE_SIDE // 2 * _TABLE_SIDE, device="cpu")
    down = (rows + _TABLE_SIDE // 2).div(_TABLE_SIDE, rounding_mode="floor")
    bins, magnitude = _polar(down.float(), (rows - down * _TABLE_SIDE).float(), num_bins)
    return _one_hot(num_bins)[bins.flatten().long()] * magnitude.view(-1, 1)


def _one_hot(num_bins: int) -> Tensor:
    """One-hot rows [2 n + 1, n] that map the bins of a full turn, and exactly 180 degrees, to the n of half a turn."""
    return torch.eye(num_bins, dtype=torch.float32, device="cpu").repeat(3, 1)[: 2 * num_bins + 1]


def _row_sums(planes: Tensor, cell: int, num_bins: int, gradient: Gradient) -> Tensor:
    """Like :func:`_row_sums_by_table` for any number type; bit-identical for the same values."""
    b, H, W = planes.shape
    bins, magnitude = _polar(*gradient(planes.float()), num_bins)
    sums = F.embedding_bag(
        bins.int().view(-1, cell), _one_hot(num_bins), per_sample_weights=magnitude.view(-1, cell), mode="sum"
    )
    return sums.view(b, H // cell, cell, W // cell, num_bins)


def _pooled(x: Tensor, cell: int, num_bins: int, gradient: Gradient) -> Tensor:
    """[B, C, H, W] float32 -> [B, C, H/cell, W/cell, bins], without atomic additions, which are not deterministic."""
    bins, magnitude = _polar(*gradient(x), num_bins)
    bins.remainder_(num_bins)
    return torch.stack([F.avg_pool2d(magnitude * (bins == k), cell) for k in range(num_bins)], dim=-1)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centered differences of [..., H, W] along rows and along columns, zero across the border."""
    (H, W), g_row, g_col = x.shape[-2:], x[..., 2:, :] - x[..., :-2, :], x[..., 2:] - x[..., :-2]
    return F.pad(g_row, (0, 0, 1, min(H - 1, 1))), F.pad(g_col, (1, min(W - 1, 1)))  # an image may be one pixel wide


def _gradient_of_valid(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_gradient` of images with NaN; both are zero where the pixel is NaN or one of them needs NaN."""
    g_row, g_col = _gradient(x)
    unknown = x.isnan() | g_row.isnan() | g_col.isnan()
    return g_row.masked_fill(unknown, 0.0), g_col.masked_fill(unknown, 0.0)


def _polar(g_row: Tensor, g_col: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Orientation in bins of a full turn, 0 to 2 n as float32, and magnitude."""
    # Raised by a few float32 steps: an angle on the edge of two bins (45 degrees with 4 bins) must not be rounded below
    # it on one device and not on another. Integer gradients come no nearer to an edge without lying on it.
    bins = torch.atan2(g_row, g_col).mul_(n / math.pi).add_(n * (1 + 4e-7)).floor_()
    return bins, (g_row * g_row).addcmul_(g_col, g_col).sqrt_()


@dataclass(frozen=True)
class HogSettings(TargetSettings):
    """Settings of :class:`HogTarget`.

    Args:
        cell: side of a cell in pixels, which must divide the patch; None = :func:`default_cell`.
        bins: number of orientations, 1 to 255.
        color: add the mean color of each cell, which gradients do not know.
    """

    cell: int | None = None
    bins: int = NUM_BINS
    color: bool = False

    def __post_init__(self) -> None:
        check_int("hog_bins", self.bins, Bounds(ge=1, le=MAX_BINS))
        if self.cell is not None:
            check_int("hog_cell", self.cell, Bounds(ge=1, most=MAX_SIDE))


class HogTarget(Target):
    """Whitened HOG of a token's cells, in the order (cell row, cell column, bin, channel) (DMJD, section III-C).

    With colors, the means of the normalized image over each cell follow, in the order (cell row, cell column, channel).

    Args:
        encoder: determines patch size and number of channels.
        settings: cell size, number of bins, colors.

    Raises:
        ValueError: if the cell does not divide the patch.
    """

    name = "hog"
    settings_class = HogSettings

    def __init__(self, encoder: Encoder, settings: HogSettings = HogSettings()) -> None:
        super().__init__()
        self.cell_size = default_cell(encoder.patch_size) if settings.cell is None else settings.cell
        if encoder.patch_size % self.cell_size:
            raise ValueError(f"hog_cell {settings.cell} does not divide the {encoder.patch_size}-pixel patch")
        self.num_bins = settings.bins
        self.cells = encoder.patch_size // self.cell_size  # along one side of a token
        self.edges_dim = self.cells**2 * self.num_bins * encoder.in_chans
        self.color = settings.color
        self.dim = self.edges_dim + (self.cells**2 * encoder.in_chans if settings.color else 0)

    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """[B, C, H, W] twice -> [B, N, cells^2 * bins * C], or [B, N, cells^2 * (bins + 1) * C] with colors."""
        edges = self._tokens(whiten(hog(raw, self.cell_size, self.num_bins)))
        if not self.color:
            return edges
        return torch.cat([edges, self._colors(F.avg_pool2d(normalized.float(), self.cell_size))], dim=2)

    def of_valid(self, normalized: Tensor, raw: Tensor, valid: Tensor) -> Tensor:
        """As :meth:`forward`, without the gradients at the border of the valid area; colors are those of valid pixels,
        and 0, the mean, in cells without any.
        """
        edges = self._tokens(whiten(hog(raw, self.cell_size, self.num_bins, valid)))
        if not self.color:
            return edges
        inside = F.avg_pool2d(valid.float(), self.cell_size)
        means = F.avg_pool2d(normalized.float() * valid, self.cell_size) / inside.clamp(min=1 / self.cell_size**2)
        return torch.cat([edges, self._colors(means)], dim=2)

    def _colors(self, means: Tensor) -> Tensor:
        """[B, C, h*cells, w*cells] -> [B, N, cells^2 * C]."""
        return self._tokens(means.unsqueeze(-1))

    def _tokens(self, x: Tensor) -> Tensor:
        """Values of cells, [B, C, h*cells, w*cells, bins] -> [B, N, cells^2 * bins * C]."""
        B, C, rows, columns, bins = x.shape
        s = self.cells
        x = x.view(B, C, rows // s, s, columns // s, s, bins).permute(0, 2, 4, 3, 5, 6, 1)  # B, h, w, s, s, bins, C
        return x.reshape(B, -1, s * s * bins * C)
