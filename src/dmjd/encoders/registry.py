"""Encoders by name."""

import inspect
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
from dmjd.encoders.timm_names import is_timm_name
from dmjd.encoders.timm_vit import TimmViT
from dmjd.encoders.vit import VisionTransformer
from dmjd.files import tuples_to_lists
from dmjd.nn.modes import own_defaults
from dmjd.suggest import did_you_mean

# A new family is its class and one entry here.
ENCODERS: dict[str, type[Encoder]] = {"vit": VisionTransformer, "conv_vit": ConvViT, "timm": TimmViT}

MAX_TOKENS = 1 << 20  # of an image


def encoder_names() -> list[str]:
    """The common names of our own families.

    Some of them accept other patch sizes too (``vit_small_patch10``). Names of models of timm,
    :func:`~dmjd.encoders.timm_names.timm_names`, follow ``timm/``.
    """
    return [
        f"{family}_{size}_patch{patch}"
        for family, cls in ENCODERS.items()
        for size in cls.SIZES
        for patch in cls.PATCHES
    ]


def names_of(family: str) -> str:
    """All names of a family, for messages: ``vit_*``."""
    return f"{family}{ENCODERS[family].NAME.pattern[0]}*"


def is_encoder_name(text: str) -> bool:
    """Whether ``text`` has the form of an encoder name of a known family; its size may be misspelled."""
    return any(cls.NAME.fullmatch(rest) is not None for cls, rest in _split(text))


def _split(name: str) -> list[tuple[type[Encoder], str]]:
    """The families with which a name begins, and the rest of the name for each."""
    return [(cls, name.removeprefix(family)) for family, cls in ENCODERS.items() if name.startswith(family)]


def encoder_family(name: str) -> type[Encoder]:
    """The class of an encoder, by its name.

    Raises:
        ValueError: for an unknown name; the nearest is suggested.
    """
    return _resolve(name)[0]


def _resolve(name: str) -> tuple[type[Encoder], dict[str, Any]]:
    """The class of an encoder, and the arguments that its name stands for."""
    for cls, rest in _split(name):
        if (arguments := cls.named_arguments(rest)) is not None:
            return cls, arguments
    hint = did_you_mean(name, [f"timm/{name}"] if is_timm_name(name) else encoder_names())
    families = [
        f"{family}_{{{','.join(cls.SIZES)}}}_patch{{{','.join(map(str, cls.PATCHES))}}}"
        for family, cls in ENCODERS.items()
        if cls.SIZES
    ]
    raise ValueError(
        f"unknown encoder {shown(name)}{hint} Encoders: {', '.join(families)}, timm/NAME (vision transformers)"
    )


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
        name: ``vit_{tiny,small,base,large,huge,giant}_patch{P}``, ``conv_vit_{tiny,small,base,large}_patch{4,8,16}``,
            or ``timm/NAME`` for a vision transformer of timm.
        img_size: pixels, one side or (height, width), divisible by the patch.
        in_chans: channels.
        class_token: one prefix token (ViT only). A model of timm has one if its name says so, or if this is True.
        drop_path: stochastic depth of the last block.
        features_only: return timm's feature backbone instead, a module: images -> list of maps [B, D, h, w], with
            ``feature_info``.
        out_indices: which maps (default: the last four, all three of ConvViT).
        overrides: other arguments of :class:`VisionTransformer` (``embed_dim``, ``depth``, ``num_heads``,
            ``mlp_ratio``), :class:`ConvViT` (``embed_dims``, ``depths``, ``num_heads``, ``mlp_ratios``) or
            :class:`TimmViT` (those of the ViT, ``patch_size``). Lists count as tuples, so that the ``options`` of an
            encoder file can be passed.

    Returns:
        :class:`Encoder` (or timm's ``FeatureGetterNet``).

    Raises:
        ValueError: unknown name (the nearest is suggested), unknown override, or sizes that do not fit.
    """
    cls, named = _resolve(check_text("encoder", name))
    accepted = _arguments(cls)
    if unknown := set(overrides) - accepted:
        raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(accepted))}")
    if class_token and "class_token" not in accepted:
        others = " or ".join(names_of(family) for family, c in ENCODERS.items() if "class_token" in _arguments(c))
        raise ValueError(f"{cls.__name__} has no class token; use a {others} encoder or leave class_token out")
    H, W = _sides(img_size)
    options = {"in_chans": in_chans, "class_token": class_token, "drop_path": drop_path} | overrides
    options = {key: _checked(cls, key, value) for key, value in options.items()}
    arguments = named | {key: value for key, value in options.items() if key in accepted}
    build = cast(Callable[..., Encoder], cls)
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items()}
    patch_size = arguments["patch_size"]
    _check_size(cls, name, defaults | arguments, H // patch_size * (W // patch_size))
    encoder = build(img_size=(H, W), **arguments)
    encoder.name = name
    encoder.options = tuples_to_lists({"img_size": (H, W), **options})
    return feature_backbone(encoder, out_indices) if features_only else encoder


_LIMITS = {
    "embed_dim": Bounds(ge=4, most=MAX_WIDTH),
    "depth": Bounds(ge=1, most=MAX_DEPTH),
    "num_heads": Bounds(ge=1, most=MAX_HEADS),
    "mlp_ratio": Bounds(gt=0, most=MAX_MLP_RATIO),
    "in_chans": Bounds(ge=1, most=MAX_CHANNELS),
    "patch_size": Bounds(ge=1, most=MAX_SIDE),
    "drop_path": ANY,  # the family checks its range
}


def _checked(cls: type[Encoder], argument: str, value: Any) -> Any:
    """Check an argument of a family by its setting, before anything is allocated; lists become tuples."""
    setting, count = {arg: (name, count) for name, (arg, count) in cls.SETTINGS.items()}.get(argument, (argument, 1))
    if setting == "class_token":
        return check_bool(argument, value)
    if setting not in _LIMITS:  # an argument that only this family has
        return tuple(value) if isinstance(value, list) else value
    check = check_float if setting in ("mlp_ratio", "drop_path") else check_int
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
    values = [arguments[argument] for argument in settings]
    if len(values) < 3 or None in values:  # a family without one of them, or whose constructor checks it
        return
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
    """Arguments that ``create_encoder`` accepts for a family."""
    return set(inspect.signature(cls).parameters) - cls.NAMED


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
        copy.load_state_dict(encoder.state_for(copy.grid))
    return copy
