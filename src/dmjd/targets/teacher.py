"""Targets from a frozen pre-trained model: any timm model with feature maps, or the encoder of a previous run."""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from dmjd.config.checks import MAX_DEPTH, MAX_SIDE, Bounds, check_int, check_path
from dmjd.encoders.base import Encoder, check_divisible
from dmjd.encoders.timm_weights import load_timm, timm_preprocess
from dmjd.encoders.weights import load_encoder
from dmjd.images.preprocess import Preprocess
from dmjd.images.reading import LUMINANCE
from dmjd.targets.base import Target, TargetSettings, whitened_mean
from dmjd.warning import DMJDWarning

_HASH_DIGITS = 16


@dataclass(frozen=True)
class TeacherSettings(TargetSettings):
    """Settings of :class:`TeacherTarget`.

    Args:
        source: a run folder, an encoder file or checkpoint, a timm model name (pre-trained weights are downloaded, or
            taken from the cache), or a timm model or :class:`~dmjd.encoders.base.Encoder`, which is put into
            evaluation mode.
        layers: number of last blocks to average, each whitened first.
        skip: number of last blocks to leave out before that; 1 makes a convolutional teacher's maps finer.
        size: side in pixels, or height and width, of the images that the teacher gets; None: its own. Smaller is
            cheaper. 0: the student's, or larger if the teacher's map would otherwise have less than half of the
            student's tokens in a direction, but then at most its own.
    """

    source: str | Path | nn.Module | None = None
    layers: int = 1
    skip: int = 0
    size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_int("teacher_layers", self.layers, Bounds(ge=1, most=MAX_DEPTH))
        check_int("teacher_skip", self.skip, Bounds(ge=0, most=MAX_DEPTH))
        for side in self.size or ():
            check_int("teacher_size", side, Bounds(ge=0, most=MAX_SIDE))
        if 0 in (self.size or ()) and any(self.size or ()):
            raise ValueError("teacher_size: 0 stands for height and width; give it alone")


class TeacherTarget(Target):
    """Dense features of a frozen model, resized to the token grid and whitened.

    The teacher gets the image with its own preprocessing: channels, size, mean and standard deviation. The features are
    the block outputs of an encoder of ours, as downstream, or the maps after the final norm of a timm model; prefix
    tokens are dropped. Checkpoints hold only a hash of the teacher's weights, which is compared on resume.

    Args:
        encoder: the student, which determines token grid and number of channels.
        settings: source and number of layers.

    Raises:
        ValueError: if the source is not a usable teacher; the message names the cure.
    """

    name = "teacher"
    settings_class = TeacherSettings
    autocast = True

    def __init__(self, encoder: Encoder, settings: TeacherSettings = TeacherSettings()) -> None:
        super().__init__()
        teacher, layers = settings.source, settings.layers
        if teacher is None:
            raise ValueError("target 'teacher' needs a teacher: --teacher RUN, an encoder file or a timm model")
        self.source = "the model given" if isinstance(teacher, nn.Module) else str(teacher)
        model = teacher if isinstance(teacher, nn.Module) else load_teacher(str(teacher))
        # Held in a tuple, it is not a submodule: not saved, trained or synchronized, and never in training mode.
        self._held = (model.eval(),)
        self.layers, self.skip, self.grid = layers, settings.skip, encoder.grid
        self.preprocess = teacher_preprocess(model, self.source)
        if settings.size is not None:
            size = (settings.size[0], settings.size[-1]) if any(settings.size) else self._size_for(encoder)
            if (patch_size := _patch_size(model)) is not None:
                # A ViT of timm would leave out the pixels beyond its last whole patch, and its map be shifted.
                check_divisible(size, patch_size, "--teacher-size", "the teacher's")
            self.preprocess = dataclasses.replace(self.preprocess, img_size=size)
            if model is not teacher and hasattr(model, "set_input_size"):  # a timm ViT; one that is given is left alone
                cast(Callable[..., None], model.set_input_size)(img_size=size)
        self.fingerprint = fingerprint_of(model, self.preprocess)
        maps = self._try(encoder.in_chans)
        if len({feature_map.shape[1] for feature_map in maps}) > 1:
            raise ValueError(f"the last {layers} maps of teacher {self.source} differ in width: use --teacher-layers 1")
        self.dim = maps[0].shape[1]
        if maps[0].shape[2:] == (1, 1) and encoder.num_patches > 1:
            height, width = self.preprocess.img_size
            warnings.warn(
                f"teacher {self.source} has one feature for a whole image of {height} x {width} pixels, so all tokens "
                "have the same target: give a larger --teacher-size, or --teacher-skip 1",
                DMJDWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def _size_for(self, encoder: Encoder) -> tuple[int, int]:
        """Height and width of the teacher's images for a student's, see :class:`TeacherSettings`."""
        own, patch = self.preprocess.img_size, _patch_size(self._held[0])
        if patch is None:
            cells = self._maps(torch.zeros(1, self.preprocess.in_chans, *own))[0].shape[2:]
            steps = (math.ceil(own[0] / cells[0]), math.ceil(own[1] / cells[1]))
        else:
            steps = (patch, patch)  # pixels per token of the teacher
        sides = []
        for student, tokens, whole, step in zip(encoder.img_size, encoder.grid, own, steps, strict=True):
            side = max(student, min(math.ceil(tokens / 2) * step, whole))
            sides.append(side if patch is None else round(side / step) * step)
        return sides[0], sides[1]

    def _try(self, in_chans: int) -> list[Tensor]:
        """Feature maps of a blank image, so that an unsuitable teacher fails at construction."""
        wanted = self.preprocess.in_chans
        if in_chans != wanted and not (in_chans in (1, 3, 4) and wanted in (1, 3)):
            raise ValueError(
                f"teacher {self.source} takes {wanted} channels, the run has {in_chans}: "
                "give --in-chans as the teacher's, or another teacher"
            )
        with torch.no_grad():
            return self._maps(torch.zeros(1, wanted, *self.preprocess.img_size))

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Normalized images -> feature maps [B, C, h, w] of the last layers, in the teacher's own grid."""
        model = self._held[0]
        count = self.layers + self.skip
        if isinstance(model, Encoder):
            if count > model.depth:
                raise ValueError(f"{self._flags()}: the teacher has only {model.depth} blocks")
            outputs = model.block_outputs(images, count)[: self.layers]
            return [x.transpose(1, 2).unflatten(2, model.check_images(images)) for x in outputs]
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"teacher {self.source} gives no token grid or feature map (timm's forward_intermediates)")
        try:
            intermediates = cast(Callable[..., list[Tensor]], model.forward_intermediates)
            return intermediates(
                images,
                indices=list(range(-count, -self.skip)),
                norm=True,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        except AssertionError as error:  # raised by timm for more layers than there are, and for sizes a ViT rejects
            if self.preprocess.img_size != teacher_preprocess(model, self.source).img_size:
                raise ValueError(f"--teacher-size: teacher {self.source} does not take it ({error})") from None
            raise ValueError(f"{self._flags()}: teacher {self.source} has fewer layers") from None

    def _flags(self) -> str:
        return f"--teacher-layers {self.layers}" + (f" --teacher-skip {self.skip}" if self.skip else "")

    @torch.no_grad()
    def forward(self, normalized: Tensor, raw: Tensor) -> Tensor:
        """``raw`` [B, c, H, W] -> [B, N, C]."""
        images = to_channels(raw.float(), self.preprocess.in_chans)
        if images.shape[2:] != self.preprocess.img_size:
            images = F.interpolate(images, self.preprocess.img_size, mode="bicubic", antialias=True).clamp(0, 255)
        # Convolutions of a CNN take half the time with channels last; a ViT does not mind.
        maps = self._maps(self.preprocess.normalize(images).contiguous(memory_format=torch.channels_last))
        return whitened_mean([to_grid(x.float(), self.grid).flatten(2).transpose(1, 2) for x in maps])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TeacherTarget":
        """Move or cast the teacher together with the model."""
        self._held[0]._apply(fn)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """The hash of the teacher, for checkpoints: [16] uint8."""
        return torch.tensor(list(self.fingerprint.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the hash; ValueError if the run was started with another teacher."""
        if (saved := bytes(state.tolist()).decode()) != self.fingerprint:
            raise ValueError(
                f"--teacher {self.source} is not the teacher this run began with (the hash of its weights is "
                f"{self.fingerprint}, the run's is {saved}): pass the former one, or another --out"
            )


def load_teacher(source: str) -> nn.Module:
    """Load a pre-trained model from a path or a timm name; torch's random state is left unchanged.

    Raises:
        ValueError: if there is no such model, or its weights are not available.
    """
    if check_path("teacher", source).exists():
        with torch.random.fork_rng(devices=[]):
            return load_encoder(source)
    return load_timm(source, "teacher", "--teacher")


def teacher_preprocess(model: nn.Module, source: str) -> Preprocess:
    """The teacher's own preprocessing."""
    if isinstance(model, Encoder):
        if model.preprocess is None:
            raise ValueError(f"teacher {source} does not know its preprocessing: set its preprocess = Preprocess(...)")
        return model.preprocess
    return timm_preprocess(model)


def _patch_size(model: nn.Module) -> int | None:
    """Side of the patches of a ViT in pixels; None for other models, which take any size or refuse it themselves."""
    if isinstance(model, Encoder):
        return model.patch_size
    if isinstance(model, (VisionTransformer, Eva)):
        embedding: Any = model.patch_embed
        return int(embedding.patch_size[0])
    return None


def fingerprint_of(model: nn.Module, preprocess: Preprocess) -> str:
    """16 hexadecimal digits of a hash of a model's weights, their names and the preprocessing."""
    digest = hashlib.sha256(json.dumps(preprocess.to_dict(), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:_HASH_DIGITS]


def to_channels(raw: Tensor, in_chans: int) -> Tensor:
    """Convert images [B, c, H, W] on the 0..255 scale to 1 or 3 channels, like ``read_image``."""
    if raw.shape[1] == in_chans:
        return raw
    if raw.shape[1] == 4:
        alpha = raw[:, 3:] / 255
        raw = raw[:, :3] * alpha + 255 * (1 - alpha)
    if raw.shape[1] == 3 and in_chans == 1:
        return (raw * raw.new_tensor(LUMINANCE).view(3, 1, 1)).sum(dim=1, keepdim=True)
    return raw.expand(-1, in_chans, -1, -1)


def to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize feature maps [B, C, h, w] to a grid: average pooling to a coarser one, bilinear to a finer one."""
    h, w = x.shape[2:]
    if (h, w) == grid:
        return x
    if h >= grid[0] and w >= grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
