"""Pre-trained models of timm, by name, from a folder or from the hub; without a network only the cache is searched."""

import contextlib
from typing import Any

import huggingface_hub.constants as hub
import timm
import torch
from torch import nn

from dmjd.hub import offline_if_unreachable
from dmjd.images.preprocess import Preprocess
from dmjd.suggest import did_you_mean

PREFIXES = ("hf-hub:", "local-dir:")  # timm's, for weights that are not in its list


def is_timm_source(source: str) -> bool:
    """Whether a text is the name of a timm model, or has one of timm's prefixes."""
    return source.startswith(PREFIXES) or timm.is_model(source)


def load_timm(source: str, what: str, flag: str, only: tuple[type[nn.Module], ...] = ()) -> nn.Module:
    """A pre-trained model of timm without its head; torch's random state is left unchanged.

    Args:
        source: a name of timm's list, ``hf-hub:NAME`` or ``local-dir:FOLDER``.
        what: what the model is to the user, for error messages.
        flag: by which flag it was given.
        only: classes to accept, which are checked before weights are read; () = all.

    Raises:
        ValueError: if there is no such model, it is of another class, or its weights are not available.
    """
    if not is_timm_source(source):
        hint = did_you_mean(source, timm.list_models())
        raise ValueError(f"{what} {source} is not a run folder, an encoder file or a timm model{hint}")
    network = contextlib.nullcontext(True) if source.startswith("local-dir:") else offline_if_unreachable()
    reachable = True
    try:
        with torch.random.fork_rng(devices=[]), network as reachable:
            if only:
                with torch.device("meta"):
                    _check_class(timm.create_model(source, num_classes=0), source, what, only)
            return timm.create_model(source, pretrained=True, num_classes=0)
    except _OtherClassError:
        raise
    # Networks, caches and timm fail in many ways; all mean that the weights are not available.
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if not reachable:
            reason = f"{hub.ENDPOINT} cannot be reached, and they are not in its cache, {hub.HF_HUB_CACHE}"
        raise ValueError(
            f"the weights of {what} {source} are not available ({reason}): give a folder that holds them, "
            f"{flag} local-dir:FOLDER, a run folder or an encoder file"
        ) from None


class _OtherClassError(ValueError):
    """A model is not of a class that is accepted."""


def _check_class(model: nn.Module, source: str, what: str, only: tuple[type[nn.Module], ...]) -> None:
    if not isinstance(model, only):
        kinds = " or ".join(kind.__name__ for kind in only)
        raise _OtherClassError(f"{what} {source} is not a ViT: its class is {type(model).__name__}, not {kinds}")


def timm_preprocess(model: nn.Module) -> Preprocess:
    """The preprocessing that timm's configuration of a model names."""
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    return Preprocess((height, width), channels, tuple(data["mean"]), tuple(data["std"]))
