"""Names of timm's models: which can be encoders, and why the others cannot."""

import functools
import inspect
from collections.abc import Callable

import timm

from dmjd.config.checks import shown
from dmjd.suggest import did_you_mean

# Class of a model -> its argument for a norm after pooling. Only these classes compute a subset of the tokens exactly.
CLASSES = {"VisionTransformer": "fc_norm", "Eva": "use_fc_norm"}

INSTEAD = "take a plain one, such as timm/vit_small_patch16_224 or timm/vit_small_patch16_dinov3"

_RELATIVE = "its attention adds a table of relative positions that belongs to whole images"

# Class of a model -> why masked tokens cannot be left out.
_REASONS = {
    "Beit": _RELATIVE,
    "VisionTransformerRelPos": _RELATIVE,
    "VisionTransformerDistilled": "it has a token and a head for distillation",
}

_MIXING = "it is no plain vision transformer, whose blocks take any subset of the tokens"


def is_timm_name(name: str) -> bool:
    """Whether timm has a model of this name, with or without a tag of weights (``NAME.TAG``)."""
    return timm.is_model(name)


def timm_names() -> list[str]:
    """The names of timm's plain vision transformers. A few have convolutional stems, which are refused when built."""
    return [name for name in timm.list_models() if _class_of(name) in CLASSES]


def check_timm_name(name: str, names: Callable[[], list[str]] = timm.list_models) -> None:
    """Check that timm has a model of this name and, with a tag, such weights.

    Args:
        name: as for ``timm.create_model``, with or without a tag of weights.
        names: what to suggest from.

    Raises:
        ValueError: if it has not; the nearest name is suggested.
    """
    architecture, _, tag = name.partition(".")
    if not architecture:
        raise ValueError("timm/ lacks the name of a model: give one, such as timm/vit_small_patch16_224")
    if not is_timm_name(architecture):
        raise ValueError(f"timm has no model {shown(architecture)}{did_you_mean(architecture, names())}")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise ValueError(f"timm has no weights {shown(name)}{did_you_mean(name, tagged)} The tag may be left out")


@functools.cache
def class_of(name: str) -> str:
    """Name of the class of a model of timm: one of :data:`CLASSES`.

    Args:
        name: as for ``timm.create_model``, with or without a tag of weights.

    Raises:
        ValueError: for an unknown name or tag (the nearest is suggested), or a model of another class.
    """
    check_timm_name(name, timm_names)
    architecture = name.partition(".")[0]
    kind = _class_of(architecture)
    if kind not in CLASSES:
        reason = _REASONS.get(kind, _MIXING)
        raise ValueError(f"timm/{name} ({kind}) cannot leave masked tokens out: {reason}; {INSTEAD}")
    return kind


def _class_of(name: str) -> str:
    """Name of the class of a model, or of its file in timm where its function does not tell."""
    build = timm.model_entrypoint(name)
    kind = inspect.signature(build).return_annotation
    if kind is inspect.Signature.empty:
        return build.__module__.rpartition(".")[2]
    return kind if isinstance(kind, str) else kind.__name__
