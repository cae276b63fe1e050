"""Build the parts of a run from its configuration, and load them back from a run folder."""

import json
from pathlib import Path
from typing import Any

import torch

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import has_split, open_source
from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import create_encoder, encoder_family
from dmjd.images.preprocess import Preprocess
from dmjd.model import MaskedImageModel
from dmjd.runs.checkpoint import RunFolder
from dmjd.targets.registry import create_target

LISTING = "files.txt"  # in a run folder: the sorted list of images


def build_encoder(config: PretrainConfig) -> Encoder:
    """The encoder of a configuration, with random weights from torch's global random state."""
    return create_encoder(
        config.encoder,
        img_size=config.size,
        in_chans=config.in_chans,
        class_token=config.class_token,
        drop_path=config.drop_path,
        **_encoder_sizes(config),
    )


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


def build_model(config: PretrainConfig) -> MaskedImageModel:
    """The whole pre-training model of a configuration, weights from its seed."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(config)
    return MaskedImageModel(
        encoder,
        config.target,
        **_build_targets(config, encoder),
        num_views=config.num_views,
        mask_ratio=config.mask_ratio,
        pred_ratio=config.pred_ratio,
        block_size=config.block_size,
        disjoint=config.disjoint,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        decoder_mlp_ratio=config.decoder_mlp_ratio,
        decode_ratio=config.decode_ratio,
        projector_depth=config.projector_depth,
        mim=config.mim,
        vis=config.vis,
        theta=config.theta,
        mim_loss=config.mim_loss,
        vis_loss=config.vis_loss,
    )


def _build_targets(config: PretrainConfig, encoder: Encoder) -> dict[str, Any]:
    """The targets of the branches that are on, as the model's arguments; one target where both have the same name."""
    names = config.branch_targets
    made = {
        name: create_target(
            name,
            encoder,
            hog_cell=config.hog_cell,
            hog_bins=config.hog_bins,
            teacher=config.teacher,
            teacher_layers=config.teacher_layers,
            ema_layers=config.ema_layers,
            ema_momentum=config.ema_momentum,
        )
        for name in dict.fromkeys(names.values())
    }
    return {f"{branch}_target": made[name] for branch, name in names.items()}


def open_data(config: PretrainConfig, data: str, split: str, listing: Path | None = None) -> Source:
    """Open a data source with the labels, channels and value range of a configuration."""
    return open_source(
        data,
        split=split,
        labels=config.labels,
        in_chans=config.in_chans,
        value_range=(config.value_range[0], config.value_range[1]) if config.value_range is not None else None,
        listing=listing,
    )


def open_test_data(config: PretrainConfig, data: str, test_data: str | None) -> Source | None:
    """The test part of ``test_data`` (all of it if it has no parts), else of ``data``; None if there is none."""
    if test_data is not None:
        return open_data(config, test_data, "test" if has_split(test_data, "test") else "train")
    return open_data(config, data, "test") if has_split(data, "test") else None


def open_images(
    run: str | Path, preprocess: Preprocess, data: str | Path | None = None, split: str = "train", **changes: Any
) -> Source:
    """Open images for a trained encoder: those of its run, or others.

    Args:
        run: a run folder, or an encoder file together with ``data``. preprocess: the encoder's.
        data: None: what the run was pre-trained on. split: "train" or "test".
        changes: changed settings of the run, such as ``labels``; None: as the run.

    Raises:
        ValueError: for a folder that is no run, or data that cannot be opened.
    """
    run = Path(run).expanduser()
    config = read_config(run) if run.is_dir() else PretrainConfig()
    config = config.replace(
        in_chans=preprocess.in_chans,
        value_range=preprocess.value_range,
        **{name: value for name, value in changes.items() if value is not None},
    )
    if data is None and config.data is None:
        raise ValueError(f"{run} is no run folder, so it has no data of its own: pass --data")
    listing = run / LISTING if data is None and split == "train" else None
    return open_data(config, str(data or config.data), split, listing=listing)


def read_config(run: str | Path) -> PretrainConfig:
    """The configuration of a run folder.

    Raises:
        ValueError: for a folder that is no run.
    """
    file = Path(run).expanduser() / "config.json"
    try:
        return PretrainConfig.from_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{run} is no run folder: it has no config.json; give the --out of a pre-training") from None


def load_model(run: str | Path) -> tuple[MaskedImageModel, PretrainConfig]:
    """Load the pre-training model of a run at its newest checkpoint.

    Returns:
        The model in evaluation mode, and the run's configuration.

    Raises:
        ValueError: for a folder that is no run, or has no readable checkpoint.
    """
    config = read_config(run)
    checkpoint, _ = RunFolder(run, owner=False).newest()
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint yet; wait for its first one (--checkpoint-every steps)")
    # The teacher may have moved since the checkpoint; loading the state checks that it is the same one.
    config = PretrainConfig.from_json(json.dumps(checkpoint.state["config"])).replace(teacher=config.teacher)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    model.load_state_dict(checkpoint.part("model"))
    model.encoder.preprocess = Preprocess.from_dict(checkpoint.state["encoder"]["preprocess"])
    return model.eval(), config
