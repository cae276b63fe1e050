"""Pre-trained models of timm by name, and models of the hub; without a network only the cache is searched."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from dmjd.checked_json import read_json
from dmjd.encoders.sharded import INDEX, read_index
from dmjd.encoders.timm_names import timm_names
from dmjd.hub import HUB, offline_if_unreachable
from dmjd.images.preprocess import Preprocess
from dmjd.suggest import did_you_mean
from dmjd.text import shortened

SHOWN = 5  # names of tensors in a message

MOST_LETTERS = 300  # of another library's message

_SEED = 7_305_119  # of random weights that no file holds by chance

TIMM = "timm/"  # begins the names of encoders from timm; timm's own names have no such beginning

LOCAL = "local-dir:"

PREFIXES = (HUB, LOCAL)  # timm's, for weights that are not in its list


def is_timm_source(source: str) -> bool:
    """Whether a text is the name of a timm model, or has one of timm's prefixes."""
    return source.startswith(PREFIXES) or timm.is_model(source)


def load_timm(source: str, what: str, flag: str, only: tuple[type[nn.Module], ...] = ()) -> nn.Module:
    """A pre-trained model of timm without its head; torch's random state is left unchanged.

    Args:
        source: a name of timm's list, with or without ``timm/``, ``hf-hub:NAME`` or ``local-dir:FOLDER``.
        what: what the model is to the user, for error messages.
        flag: by which flag it was given.
        only: classes to accept, which are checked before weights are read; () = all.

    Raises:
        ValueError: if there is no such model, it is of another class, or its weights are not available.
    """
    name = source.removeprefix(TIMM)
    if not is_timm_source(name):
        given = source.removesuffix(name)  # the prefix, if there is one
        hint = did_you_mean(source, [given + model for model in (timm_names() if only else timm.list_models())])
        raise ValueError(f"{what} {source} is not a run folder, an encoder file or a timm model{hint}")
    with _looked_for(source, what, flag), torch.random.fork_rng(devices=[]):
        if only:
            with torch.device("meta"):
                _check_class(timm.create_model(name, num_classes=0), source, what, only)
        torch.manual_seed(_SEED)
        model = timm.create_model(name, pretrained=True, num_classes=0)
        torch.manual_seed(_SEED)
        _check_loaded(model, timm.create_model(name, num_classes=0), source, what)
        return model


def hub_folder(source: str, what: str, flag: str) -> Path | None:
    """The local folder of a model on the hub that is not in timm's form, downloaded if the cache lacks it.

    Args:
        source: ``hf-hub:NAME`` or ``hf-hub:NAME@REVISION``.
        what, flag: see :func:`load_timm`.

    Returns:
        The folder; None if the model is in timm's form.

    Raises:
        ValueError: if the model is not available.
    """
    name, _, revision = source.removeprefix(HUB).partition("@")
    with _looked_for(source, what, flag):
        config = Path(hf_hub_download(name, "config.json", revision=revision or None))
        if "architecture" in read_json(config, dict[str, Any]):  # timm's key
            return None
        _download_weights(name, revision or None)
        with contextlib.suppress(EntryNotFoundError):  # not every model has it
            hf_hub_download(name, "preprocessor_config.json", revision=revision or None)
    return config.parent


def _download_weights(name: str, revision: str | None) -> None:
    """Download the weights of a model on the hub; those of large models are several files."""
    try:
        hf_hub_download(name, "model.safetensors", revision=revision)
    except EntryNotFoundError as missing:
        try:
            index = hf_hub_download(name, INDEX, revision=revision)
        except EntryNotFoundError:
            raise missing from None
        for file in read_index(Path(index)):
            hf_hub_download(name, file, revision=revision)


@contextlib.contextmanager
def _looked_for(source: str, what: str, flag: str) -> Iterator[None]:
    """Errors of networks, caches and libraries, which fail in many ways, as one line that says where was searched."""
    network = contextlib.nullcontext(True) if source.startswith(LOCAL) else offline_if_unreachable()
    reachable = True
    try:
        with network as reachable:
            yield
    except _UnusableError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), MOST_LETTERS)}"
        if not reachable:
            reason = f"{hub.ENDPOINT} cannot be reached, and they are not in its cache, {hub.HF_HUB_CACHE}"
        raise ValueError(
            f"the weights of {what} {source} are not available ({reason}): give a folder that holds them, "
            f"{flag} local-dir:FOLDER, a run folder or an encoder file"
        ) from None


class _UnusableError(ValueError):
    """A model is there, but not what is wanted."""


def _check_class(model: nn.Module, source: str, what: str, only: tuple[type[nn.Module], ...]) -> None:
    if not isinstance(model, only):
        kinds = " or ".join(kind.__name__ for kind in only)
        raise _UnusableError(f"{what} {source} is not a ViT: its class is {type(model).__name__}, not {kinds}")


def _check_loaded(model: nn.Module, fresh: nn.Module, source: str, what: str) -> None:
    """Check that no random weights were left: timm goes on if a file lacks tensors. Both models have the same seed."""
    random = fresh.state_dict()
    left = [
        key for key, value in model.state_dict().items() if torch.equal(value, random[key]) and not _is_constant(value)
    ]
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise _UnusableError(
            f"the weights of {what} {source} lack {len(left)} tensors of {type(model).__name__}: "
            f"{', '.join(left[:SHOWN])}{more}"
        )


def _is_constant(value: Tensor) -> bool:
    """Whether all numbers of a tensor are the same: biases, scales of norms and counters may well be as at first."""
    return value.numel() == 0 or bool((value == value.flatten()[0]).all())


def timm_preprocess(model: nn.Module) -> Preprocess:
    """The preprocessing that timm's configuration of a model names."""
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    return Preprocess((height, width), channels, tuple(data["mean"]), tuple(data["std"]))
