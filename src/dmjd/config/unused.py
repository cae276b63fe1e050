"""Flags that were given and have no effect in a run."""

from collections.abc import Container, Iterator

from dmjd.config.pretrain import PretrainConfig

_OF_TARGETS: dict[str, tuple[str, ...]] = {
    "hog": ("hog_cell", "hog_bins", "hog_color"),
    "teacher": ("teacher_layers", "teacher_skip", "teacher_size"),
    "ema": ("ema_layers", "ema_momentum", "ema_joined"),
}
_OF_BRANCHES: dict[str, tuple[str, ...]] = {
    "mim": ("mim_target", "mim_loss", "decode_ratio", "decoder_depth", "decoder_heads", "decoder_mlp_ratio"),
    "vis": ("vis_target", "vis_loss", "theta", "projector_depth"),
}
_BRANCHES = {"mim": "masked tokens (--mim)", "vis": "visible tokens (--vis)"}


def flags_without_effect(config: PretrainConfig, given: Container[str]) -> Iterator[str]:
    """A line about each setting of ``given`` that the configuration does not use."""
    targets = config.branch_targets
    for target, names in _OF_TARGETS.items():
        if target not in targets.values():
            others = " and ".join(sorted({*targets.values()}))
            yield from (f"{flag} has no effect: the target is {others}" for flag in _given(names, given))
    for branch, names in _OF_BRANCHES.items():
        if branch not in targets:
            yield from (
                f"{flag} has no effect: the branch on {_BRANCHES[branch]} is off" for flag in _given(names, given)
            )
    own = [f"--{branch}-target {targets[branch]}" for branch in targets if getattr(config, f"{branch}_target")]
    if "target" in given and len(own) == len(targets):
        yield f"--target has no effect beside {' and '.join(own)}"


def _given(names: tuple[str, ...], given: Container[str]) -> Iterator[str]:
    return (f"--{name.replace('_', '-')}" for name in names if name in given)
