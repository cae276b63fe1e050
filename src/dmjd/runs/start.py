"""The weights that a run starts from (``--init``): read once, recorded in its configuration, checked on resume."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dmjd.branches import ReconstructionBranch
from dmjd.config.pretrain import ENCODER_SETTINGS, PretrainConfig
from dmjd.config.recipes import NEED_INIT, settings_of_tokens
from dmjd.config.tokens import TOKEN_SETTINGS
from dmjd.encoders.base import Encoder
from dmjd.encoders.headers import has_checkpoint
from dmjd.encoders.initialization import Initialization, initialize
from dmjd.encoders.sources import Weights, read_weights
from dmjd.files import write_text
from dmjd.model import MaskedImageModel
from dmjd.runs.checkpoint import read_config_of

START_FILE = "initialization.json"  # in a run folder: what was done with the weights it starts from

_DECODER_POSITIONS = "branches.mim.decoder.pos_embed"  # computed for the grid, not trained


@dataclass
class Start:
    """The weights that a run starts from.

    Args:
        weights: the weights.
        fresh: beginnings of the names of tensors that they need not have.
        with_decoder: take over the decoder too.

    Attributes:
        settings: the settings that were left to the weights.
        encoder: what was done with the encoder's; None before :meth:`load_encoder`.
        decoder: what was done with the decoder, in words.
    """

    weights: Weights
    fresh: tuple[str, ...] = ()
    with_decoder: bool = False
    settings: tuple[str, ...] = ()
    encoder: Initialization | None = None
    decoder: str = "decoder fresh"

    def load_encoder(self, encoder: Encoder) -> None:
        """Load the encoder's weights; ValueError if they do not fit."""
        self.encoder = initialize(encoder, self.weights, self.fresh)

    @torch.no_grad()
    def load_decoder(self, model: MaskedImageModel) -> None:
        """Take over branches and multi-scale fusion, if that is wanted.

        Raises:
            ValueError: if the source has no decoder, or one of other settings.
        """
        if not self.with_decoder:
            return
        theirs, flag = self.weights.decoder, f"--init-decoder: {self.weights.source}"
        if not theirs:
            raise ValueError(f"{flag} holds no decoder: give a run, a checkpoint or published weights that have one")
        wanted = {key: value for key, value in model.state_dict().items() if key.startswith(("branches.", "fusion."))}
        wanted.pop(_DECODER_POSITIONS, None)
        for key in sorted(wanted.keys() | theirs.keys() - {_DECODER_POSITIONS}):
            had, has = ("missing" if key not in some else str(list(some[key].shape)) for some in (theirs, wanted))
            if had != has:
                raise ValueError(
                    f"{flag} has a decoder of other settings: {key} is {had} there and {has} here; "
                    "use its settings, or leave --init-decoder out"
                )
        self._check_traits(model, flag)
        model.load_state_dict({key: theirs[key] for key in wanted}, strict=False)
        self.decoder = f"decoder taken over ({len(wanted)} tensors)"

    def _check_traits(self, model: MaskedImageModel, flag: str) -> None:
        """Check what tensors of the reconstruction branch do not tell: its heads, and the prefix tokens it reads."""
        branch = dict(model.branches.items()).get("mim")
        if not isinstance(branch, ReconstructionBranch):
            return
        heads, theirs = cast(Any, branch.decoder.blocks[0]).attn.num_heads, self.weights.decoder_heads
        if theirs not in (None, heads):
            raise ValueError(
                f"{flag} has a decoder of {theirs} attention heads, not {heads}: give --decoder-heads {theirs}"
            )
        has, had = model.encoder.num_prefix_tokens, self.weights.num_prefix_tokens
        if has < had:
            raise ValueError(
                f"{flag} has a decoder that reads {had} prefix tokens (class token, registers), but here are {has}: "
                "give an encoder that has them (--class-token), or leave --init-decoder out"
            )

    def __str__(self) -> str:
        return f"{self.encoder}; {self.decoder}"

    def save(self, run: Path) -> None:
        """Record in a run folder what was done."""
        assert self.encoder is not None
        values: dict[str, Any] = {**vars(self.encoder), "decoder": self.decoder, "summary": str(self)}
        write_text(run / START_FILE, json.dumps(values, indent=2) + "\n")


def read_start(config: PretrainConfig, out: Path, own_model: bool = False) -> tuple[PretrainConfig, Start | None]:
    """Read the weights that a configuration names, unless the run has begun.

    Args:
        config: the configuration.
        out: the run folder.
        own_model: whether the caller gives a model, which has its own weights.

    Returns:
        The configuration with the hash of the weights and what was left to them, and the weights; None for random ones
        or a resumed run.

    Raises:
        ValueError: if they cannot be used, if their hash is not ``init_hash``, or if the run began from others.
    """
    if has_checkpoint(out):
        old = read_config_of(out) or config
        if old.init != config.init or (config.init_hash or old.init_hash) != old.init_hash:
            began, now = (_named(one) for one in (old, config))
            raise ValueError(f"{out} began from {began}, not from {now}: leave --init as it was, or give another --out")
        filled = {name: getattr(old, name) for name in config.from_init or ()}
        return config.replace(init_hash=old.init_hash, from_init=None, **filled), None
    return begin_from(config, own_model)


def begin_from(config: PretrainConfig, own_model: bool = False) -> tuple[PretrainConfig, Start | None]:
    """:func:`read_start` for a run that has not begun."""
    if config.init is None:
        if config.recipe in NEED_INIT and not own_model:
            raise ValueError(f"the recipe {config.recipe} starts from trained weights: give --init")
        return config, None
    if own_model:
        raise ValueError("give either a model, which has its weights, or init")
    weights = read_weights(config.init, decoder=config.init_decoder)
    if config.init_hash not in (None, weights.hash):
        raise ValueError(
            f"--init {config.init}: the hash of its weights is {weights.hash}, not {config.init_hash} (--init-hash)"
        )
    start = Start(weights, config.init_fresh or (), config.init_decoder, config.from_init or ())
    return config.replace(init_hash=weights.hash, from_init=None, **_left_to(config, weights)), start


def _left_to(config: PretrainConfig, weights: Weights) -> dict[str, Any]:
    """The settings that a configuration leaves to the weights it starts from."""
    left = config.from_init or ()
    if "encoder" in left and weights.settings is None:
        raise ValueError(f"--init {weights.source} does not say which encoder has these weights: give --encoder")
    own = dict.fromkeys(ENCODER_SETTINGS[1:]) | {"class_token": False} | (weights.settings or {})
    height, width = weights.img_size or config.size
    own |= {"img_size": (height, width) if height != width else (height,)}
    own |= {"in_chans": weights.in_chans or config.in_chans}
    if tokens := [name for name in TOKEN_SETTINGS if name in left]:
        known = {name: own[name] for name in left if name not in tokens}
        own |= settings_of_tokens(config.replace(**known))
    return {name: own[name] for name in left}


def _named(config: PretrainConfig) -> str:
    if config.init is None:
        return "random weights"
    return config.init if config.init_hash is None else f"{config.init} (hash {config.init_hash})"
