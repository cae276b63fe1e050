"""Build the parts of a run from its configuration, and load them back from a run folder."""

import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from dmjd.branches import Distillation, Reconstruction
from dmjd.config.checks import check_path
from dmjd.config.fields import LIST_SETTINGS
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.recipes import RECIPES
from dmjd.config.sources import Data
from dmjd.data.sources.base import RemoteOptions, Source
from dmjd.data.sources.registry import has_split, open_source
from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import create_encoder, encoder_family
from dmjd.encoders.weights import is_shared
from dmjd.images.preprocess import Preprocess
from dmjd.masking import MaskSampler, sampler_class
from dmjd.model import MaskedImageModel
from dmjd.nn.modes import own_defaults
from dmjd.runs.checkpoint import ModelState, RunFolder, one_line, read_config_of
from dmjd.runs.start import Start
from dmjd.targets.base import TargetSettings
from dmjd.targets.registry import target_class
from dmjd.warning import DMJDWarning

MASK_SETTINGS = ("num_views", "mask_ratio", "pred_ratio", "block_size")

LISTING = "files.txt"  # in a run folder: the sorted list of images


def build_encoder(config: PretrainConfig) -> Encoder:
    """The encoder of a configuration, with random weights from torch's global random state."""
    _check_class_token(config)
    return create_encoder(
        config.encoder,
        img_size=config.size,
        in_chans=config.in_chans,
        class_token=config.class_token,
        drop_path=config.drop_path,
        **_encoder_sizes(config),
    )


def _check_class_token(config: PretrainConfig) -> None:
    """Raise a ValueError if the encoder has no class token, and a recipe or flag adds one."""
    if not config.class_token or "class_token" in inspect.signature(encoder_family(config.encoder)).parameters:
        return
    of_recipe = config.recipe in RECIPES and RECIPES[config.recipe]().class_token
    other = "; the recipe convmae is mae without one" if config.recipe == "mae" else ""
    asked = f"the recipe {config.recipe}" if of_recipe else "--class-token"
    raise ValueError(f"{config.encoder} has no class token, which {asked} adds: give --no-class-token{other}")


def _encoder_sizes(config: PretrainConfig) -> dict[str, Any]:
    """The sizes that a configuration sets, as arguments of the encoder's family."""
    family, sizes = encoder_family(config.encoder), {}
    for setting in ("embed_dim", "depth", "num_heads", "mlp_ratio"):
        if (value := getattr(config, setting)) is None:
            continue
        flag = f"--{setting.replace('_', '-')}"
        if setting not in family.SETTINGS:
            raise ValueError(f"{flag} has no meaning for {config.encoder}; leave it out")
        argument, count = family.SETTINGS[setting]
        numbers = value if isinstance(value, tuple) else (value,)
        if len(numbers) != count:
            raise ValueError(f"{flag} takes {count} number(s) for {config.encoder}")
        sizes[argument] = numbers if count > 1 else numbers[0]
    return sizes


def build_model(config: PretrainConfig, start: Start | None = None) -> MaskedImageModel:
    """The pre-training model of a configuration, its weights initialized from the seed, or from ``start``."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(config)
    if start is not None:
        start.load_encoder(encoder)  # before a target copies it
    model = MaskedImageModel(
        encoder, masks=build_masks(config), mim=build_reconstruction(config), vis=build_distillation(config)
    )
    if start is not None:
        start.load_decoder(model)
    return model


def build_masks(config: PretrainConfig) -> MaskSampler:
    """The mask sampler of a configuration.

    Fields of the configuration are passed as the constructor's arguments of the same names.

    Raises:
        ValueError: if a setting is changed that the sampler does not take, or its value is invalid.
    """
    cls = sampler_class(config.masks)
    taken = inspect.signature(cls).parameters
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in MASK_SETTINGS:
        if name not in taken and getattr(config, name) != defaults[name]:
            reset = (
                f"; --{name.replace('_', '-')} {defaults[name]} is the default" if defaults[name] is not None else ""
            )
            raise ValueError(f"{name} has no meaning with {config.masks} masks: leave out one of them{reset}")
    return cls(**{name: getattr(config, name) for name in taken if name in defaults})


def build_reconstruction(config: PretrainConfig) -> Reconstruction | None:
    """Settings of the branch on masked tokens; None if it is off."""
    if not config.mim:
        return None
    return Reconstruction(
        target=_build_target(config, config.mim_target or config.target),
        loss=config.mim_loss,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        decoder_mlp_ratio=config.decoder_mlp_ratio,
        decode_ratio=config.decode_ratio,
    )


def build_distillation(config: PretrainConfig) -> Distillation | None:
    """Settings of the branch on visible tokens; None if it is off. Its projector is as wide as the decoder."""
    if not config.vis:
        return None
    return Distillation(
        target=_build_target(config, config.vis_target or config.target),
        loss=config.vis_loss,
        theta=config.theta,
        projector_dim=config.decoder_dim,
        projector_depth=config.projector_depth,
    )


def _build_target(config: PretrainConfig, name: str) -> str | TargetSettings:
    """The settings of a target, or its name if it has none.

    Setting ``x`` of target ``name`` is field ``name_x`` of the configuration; ``source`` is field ``name``. Settings
    that the configuration does not have keep their defaults.
    """
    settings_class = target_class(name).settings_class
    if settings_class is None:
        return name
    names = {f.name: name if f.name == "source" else f"{name}_{f.name}" for f in dataclasses.fields(settings_class)}
    return settings_class(**{f: getattr(config, field) for f, field in names.items() if hasattr(config, field)})


def open_data(
    config: PretrainConfig, data: Data, split: str, listing: Path | None = None, fetch_ahead: bool = False
) -> Source:
    """Open a data source with the labels, channels and value range of a configuration."""
    return open_source(
        data,
        split=split,
        labels=config.labels,
        in_chans=config.in_chans,
        value_range=(config.value_range[0], config.value_range[1]) if config.value_range is not None else None,
        listing=listing,
        root=config.root,
        path_column=config.path_column,
        label_column=config.label_column,
        max_unreadable=config.max_unreadable,
        nodata=config.nodata,
        alpha=config.alpha,
        remote=RemoteOptions(config.cache_dir, config.cache_gb, config.shard_window, fetch_ahead),
    )


def open_test_data(config: PretrainConfig, data: Data, test_data: str | None, split: str = "test") -> Source | None:
    """Open the test part of ``test_data`` (all of it if it has no parts), else of ``data``; None if there is none.

    With the split "val" it is the validation part of either.
    """
    if test_data is not None:
        return open_data(config, test_data, split if split == "val" or has_split(test_data, split) else "train")
    return open_data(config, data, split) if has_split(data, split) else None


def open_images(
    run: str | Path, preprocess: Preprocess, data: str | Path | None = None, split: str = "train", **changes: Any
) -> Source:
    """Open images for a trained encoder: its run's own, or others. Others need not have the labels of the run.

    Args:
        run: a run folder, or an encoder file together with ``data``.
        preprocess: preprocessing of the encoder.
        data: path or name of the images; None: those of the run.
        split: "train", "val" or "test".
        changes: settings that differ from the run's, such as ``labels``; None values are ignored. The settings of the
            run's own list do not hold for other ``data``.

    Raises:
        ValueError: if the folder is not a run, or the data cannot be opened.
    """
    run = check_path("run", run)
    config = read_config(run) if run.is_dir() and not is_shared(run) else PretrainConfig()
    if data is not None:
        config = config.replace(**dict.fromkeys(LIST_SETTINGS))
    config = config.replace(
        in_chans=preprocess.in_chans,
        value_range=preprocess.value_range,
        nodata=preprocess.nodata,
        alpha=preprocess.alpha,
        **{name: value for name, value in changes.items() if value is not None},
    )
    if changes.get("labels") == "none":
        config = config.replace(label_column=None)
    if data is None and config.data is None:
        raise ValueError(f"{run} is not a run folder, so it has no data of its own: pass --data")
    if data is None:
        listing = run / LISTING if split == "train" else None
        assert config.data is not None
        return open_data(config, config.data, split, listing=listing)
    labels_given = any(changes.get(name) is not None for name in ("labels", "label_column"))
    return _open_others(config, str(data), split, labels_given)


def _open_others(config: PretrainConfig, data: str, split: str, labels_given: bool) -> Source:
    """Open images that are not the run's own: with its labels if they have such, else without, with a warning."""
    try:
        return open_data(config, data, split)
    except ValueError:
        if labels_given or (config.labels == "none" and config.label_column is None):
            raise
        source = open_data(config.replace(labels="none", label_column=None), data, split)  # raises for other causes
        text = f"{data} is used without labels: it has none like the run's own images (--labels {config.labels})"
        warnings.warn(text, DMJDWarning, stacklevel=4)
        return source


def read_config(run: str | Path) -> PretrainConfig:
    """The configuration of a run folder.

    Raises:
        ValueError: if the folder is not a run, or its configuration is damaged and no checkpoint replaces it.
    """
    config = read_config_of(check_path("run", run))
    if config is None:
        raise ValueError(f"{run} is not a run folder: it has no config.json; give the --out of dmjd pretrain")
    return config


@own_defaults()
def load_model(run: str | Path) -> tuple[MaskedImageModel, PretrainConfig]:
    """Load the pre-training model of a run at its newest checkpoint. A damaged one is skipped with a warning.

    Returns:
        The model in evaluation mode, and the run's configuration.

    Raises:
        ValueError: if the folder is not a run, or has no readable checkpoint.
    """
    config = read_config(run)
    checkpoint, problems = RunFolder(run, owner=False).newest(ModelState)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint yet; wait for its first one (--checkpoint-every steps)")
    # The teacher may have moved since the checkpoint; loading the state checks that it is the same one.
    stored = PretrainConfig.from_json(json.dumps(checkpoint.state["config"]), str(checkpoint.path))
    config = stored.replace(teacher=config.teacher)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    try:
        model.load_state_dict(checkpoint.part("model"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path} does not fit the model of its configuration: {one_line(error)}") from None
    if problems:
        warnings.warn(
            f"{'; '.join(problems)}. The model is that of {checkpoint.path}, an older one", DMJDWarning, stacklevel=2
        )
    model.encoder.preprocess = checkpoint.preprocess()
    return model.eval(), config
