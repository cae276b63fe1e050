"""Encoders by name."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from dmjd.config.checks import (
    ANY,
    MAX_CHANNELS,
    MAX_DEPTH,
    MAX_HEADS,
    MAX_MLP_RATIO,
    MAX_SIDE,
    MAX_WIDTH,
    Bounds,
    check_bool,
    check_float,
    check_int,
    check_memory,
    check_text,
    plain,
    shown,
)
from dmjd.encoders.base import Encoder
from dmjd.encoders.conv_vit import ConvViT
from dmjd.encoders.timm_features import feature_backbone
from dmjd.encoders.vit import VisionTransformer
from dmjd.files import tuples_to_lists
from dmjd.nn.modes import own_defaults
from dmjd.suggest import did_you_mean

# A new family is its class and one entry here.
ENCODERS: dict[str, type[Encoder]] = {"vit": VisionTransformer, "conv_vit": ConvViT}

MAX_TOKENS = 1 << 20  # of an image

_NAME = re.compile(r"(\w+)_([a-z0-9]+)_patch(\d+)")


def encoder_names() -> list[str]:
    """The common names. Some families accept other patch sizes too (``vit_small_patch10``)."""
    return [
        f"{family}_{size}_patch{patch}"
        for family, cls in ENCODERS.items()
        for size in cls.SIZES
        for patch in cls.PATCHES
    ]


def is_encoder_name(text: str) -> bool:
    """Whether ``text`` has the form of an encoder name of a known family; its size may be misspelled."""
    match = _NAME.fullmatch(text)
    return match is not None and match[1] in ENCODERS


def encoder_family(name: str) -> type[Encoder]:
    """The class of an encoder, by its name.

    Raises:
        ValueError: for an unknown name; the nearest is suggested.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in ENCODERS or match[2] not in ENCODERS[match[1]].SIZES or int(match[3]) == 0:
        names = encoder_names()
        raise ValueError(f"unknown encoder {shown(name)}{did_you_mean(name, names)} Encoders: {', '.join(names)}")
    return ENCODERS[match[1]]


def nearest_name(cls: type[Encoder], embed_dim: int, patch_size: int) -> str:
    """Name of the encoder with the nearest width, for encoders whose exact sizes are given as overrides."""
    family = next(name for name, registered in ENCODERS.items() if registered is cls)
    argument = cls.SETTINGS["embed_dim"][0]

    def width(size: str) -> int:
        value = cls.SIZES[size][argument]
        return value[-1] if isinstance(value, tuple) else value

    return f"{family}_{min(cls.SIZES, key=lambda size: abs(width(size) - embed_dim))}_patch{patch_size}"


@own_defaults(callers_device=True)
def create_encoder(
    name: str,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    class_token: bool = False,
    drop_path: float = 0.0,
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    **overrides: Any,
) -> Any:
    """Create an encoder with random weights (from torch's global random state).

    Args:
        name: ``vit_{tiny,small,base,large}_patch{P}`` or ``conv_vit_{tiny,small,base,large}_patch{4,8,16}``.
        img_size: pixels, one side or (height, width), divisible by the patch.
        in_chans: channels.
        class_token: one prefix token (ViT only).
        drop_path: stochastic depth of the last block.
        features_only: return timm's feature backbone instead, a module: images -> list of maps [B, D, h, w], with
            ``feature_info``.
        out_indices: which maps (default: the last four, all three of ConvViT).
        overrides: other arguments of :class:`VisionTransformer` (``embed_dim``, ``depth``, ``num_heads``,
            ``mlp_ratio``) or :class:`ConvViT` (``embed_dims``, ``depths``, ``num_heads``, ``mlp_ratios``). Lists count
            as tuples, so that the ``options`` of an encoder file can be passed.

    Returns:
        :class:`Encoder` (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: unknown name (the nearest is suggested), unknown override, or sizes that do not fit.
    """
    cls = encoder_family(check_text("encoder", name))
    size, patch_size = name.split("_")[-2], int(name.rpartition("patch")[2])
    accepted = _arguments(cls)
    if unknown := set(overrides) - accepted:
        raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(accepted))}")
    if class_token and "class_token" not in accepted:
        others = " or ".join(f"{family}_*" for family, other in ENCODERS.items() if "class_token" in _arguments(other))
        raise ValueError(f"{cls.__name__} has no class token; use a {others} encoder or leave class_token out")
    H, W = _sides(img_size)
    options = {"in_chans": in_chans, "class_token": class_token, "drop_path": drop_path} | overrides
    options = {key: _checked(cls, key, value) for key, value in options.items()}
    arguments = {key: value for key, value in options.items() if key in accepted}
    build = cast(Callable[..., Encoder], cls)
    arguments = {**cls.SIZES[size], **arguments}
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items()}
    _check_size(cls, name, defaults | arguments, H // patch_size * (W // patch_size))
    encoder = build(img_size=(H, W), patch_size=patch_size, **arguments)
    encoder.name = name
    encoder.options = tuples_to_lists({"img_size": (H, W), **options})
    return feature_backbone(encoder, out_indices) if features_only else encoder


_LIMITS = {
    "embed_dim": Bounds(ge=4, most=MAX_WIDTH),
    "depth": Bounds(ge=1, most=MAX_DEPTH),
    "num_heads": Bounds(ge=1, most=MAX_HEADS),
    "mlp_ratio": Bounds(gt=0, most=MAX_MLP_RATIO),
    "in_chans": Bounds(ge=1, most=MAX_CHANNELS),
    "drop_path": ANY,  # the family checks its range
}


def _checked(cls: type[Encoder], argument: str, value: Any) -> Any:
    """Check an argument of a family by its setting, before anything is allocated; lists become tuples."""
    setting, count = {arg: (name, count) for name, (arg, count) in cls.SETTINGS.items()}.get(argument, (argument, 1))
    if setting == "class_token":
        return check_bool(argument, value)
    if setting not in _LIMITS:  # an argument that only this family has
        return tuple(value) if isinstance(value, list) else value
    check = check_int if setting in ("embed_dim", "depth", "num_heads", "in_chans") else check_float
    value = plain(value)
    if count == 1:
        check(argument, value, _LIMITS[setting])
        return value
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{argument} must be {count} numbers, got {shown(value)}")
    for number in value:
        check(argument, number, _LIMITS[setting])
    return tuple(plain(number) for number in value)


def check_options(cls: type[Encoder], options: Any, num_tensors: int) -> None:
    """Check the type of the options in a file, and that its blocks have tensors in the file."""
    if not isinstance(options, dict) or any(not isinstance(name, str) for name in options):
        raise ValueError(f"its options must be a table, got {shown(options)}")
    argument, _ = cls.SETTINGS.get("depth", ("depth", 1))
    depths = _checked(cls, argument, options[argument]) if argument in options else 0
    if (depth := sum(depths) if isinstance(depths, tuple) else depths) > num_tensors:
        raise ValueError(f"{depth} blocks, but the file holds {num_tensors} tensors")


def _check_size(cls: type[Encoder], name: str, arguments: Mapping[str, Any], tokens: int) -> None:
    """Check that the weights fit into memory, by a lower bound: two square matrices and the MLP of each block."""
    if tokens > MAX_TOKENS:
        raise ValueError(f"{name} would cut an image into {tokens} tokens, more than {MAX_TOKENS}: use smaller images")
    settings = [cls.SETTINGS[name][0] for name in ("embed_dim", "depth", "mlp_ratio") if name in cls.SETTINGS]
    if len(settings) < 3:  # a family without one of them
        return
    values = (arguments[argument] for argument in settings)
    widths, depths, ratios = (value if isinstance(value, tuple) else (value,) for value in values)
    blocks = (n * D * D * (2 + 2 * ratio) for D, n, ratio in zip(widths, depths, ratios, strict=True))
    check_memory(name, sum(blocks) + tokens * widths[-1])


def _sides(img_size: Any) -> tuple[int, int]:
    """Height and width from one side or both."""
    sides = plain(img_size)
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if len(sides) not in (1, 2):
        raise ValueError(f"img_size must be one side or (height, width), got {shown(img_size)}")
    height, width = (check_int("img_size", side, Bounds(ge=1, most=MAX_SIDE)) for side in (sides[0], sides[-1]))
    return height, width


def _arguments(cls: type[Encoder]) -> set[str]:
    """Arguments that ``create_encoder`` accepts for a family; the patch size is part of the name."""
    return set(inspect.signature(cls).parameters) - {"patch_size"}


def fresh_like(
    encoder: Encoder, *, seed: int, img_size: tuple[int, int] | None = None, drop_path: float = 0.0
) -> Encoder:
    """Create the same architecture with random weights from a seed, in evaluation mode.

    torch's global random state is left alone.

    Args:
        encoder: what to copy; unchanged.
        seed: seed of the weights.
        img_size: (H, W) in pixels; None = that of ``encoder``.
        drop_path: stochastic depth rate of the last block.
    """
    size = encoder.img_size if img_size is None else img_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = create_encoder(encoder.name, **encoder.options | {"img_size": size, "drop_path": drop_path}).eval()
    fresh.preprocess = encoder.preprocess
    return fresh


def resized(encoder: Encoder, img_size: tuple[int, int] | None = None, *, drop_path: float = 0.0) -> Encoder:
    """Copy an encoder, with position embeddings for another image size, in evaluation mode.

    Args:
        encoder: what to copy; unchanged.
        img_size: (H, W) in pixels; None = that of ``encoder``.
        drop_path: stochastic depth rate of the last block.
    """
    copy = fresh_like(encoder, seed=0, img_size=img_size, drop_path=drop_path)
    with torch.no_grad():
        copy.load_state_dict(encoder.state_dict() | {"pos_embed": encoder.positions(copy.grid)})
    return copy
