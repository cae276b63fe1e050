"""The images of a run: opened, compared with those it began with, divided, and how they are preprocessed."""

from pathlib import Path

from dmjd.checked_json import check_json
from dmjd.config.pretrain import PretrainConfig
from dmjd.config.sources import data_text, stored_data
from dmjd.data.recheck import check_moved
from dmjd.data.sources.base import Source
from dmjd.data.sources.registry import check_may_grow
from dmjd.data.statistics import measure_stats, range_warning
from dmjd.encoders.base import known_preprocess
from dmjd.encoders.headers import CHECKPOINTS, has_checkpoint, read_headers
from dmjd.engine.console import Console
from dmjd.engine.processes import check_same, num_processes
from dmjd.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dmjd.model import MaskedImageModel
from dmjd.pretraining.callbacks import began_with
from dmjd.pretraining.held_out import hold_out
from dmjd.pretraining.shard_window import record_window
from dmjd.runs.build import LISTING, open_data
from dmjd.runs.checkpoint import Checkpoint, PretrainState, read_config_of
from dmjd.runs.start import Start
from dmjd.targets.teacher import TeacherTarget


def images_of_run(config: PretrainConfig, out: Path) -> tuple[PretrainConfig, Source, Source, Source | None]:
    """Open the images, which must be the same in all processes, and hold some out.

    Returns:
        The configuration with what was decided, all images, those to train on, and those that are held out.

    Raises:
        ValueError: see :func:`training_images`; or if processes see other images.
    """
    source = same_images(training_images(config, out))
    config, trained, held_out = hold_out(record_window(config, source), source)
    return config, source, trained, held_out


def training_images(config: PretrainConfig, out: Path) -> Source:
    """Open the images. If ``data`` is not that of the run in ``out``, they must be the same at another path.

    The sorted list of a folder is stored with the run, and read from there once it has a checkpoint.

    Raises:
        ValueError: if they cannot be opened, are others, or there is no checkpoint that says which they were.
    """
    assert config.data is not None
    if config.data_may_grow:
        check_may_grow(config.data)
    listing = out / LISTING if has_checkpoint(out) else None
    source = open_data(config, config.data, "train", listing, fetch_ahead=True)
    old = read_config_of(out)
    if old is None or old.data is None or stored_data(old.data) == stored_data(config.data):
        return source
    headers, _ = read_headers(out / CHECKPOINTS)
    former = data_text(old.data)
    if not headers:
        raise ValueError(
            f"{out} began with --data {former} and has no checkpoint yet that its images could be compared with; "
            "give the same path, or another --out"
        )
    began, reports = began_with(check_json(headers[0].metadata, PretrainState, str(headers[0].path)), config)
    check_moved(source, began, reports, former)
    return source


def same_images(source: Source) -> Source:
    """The images, if all processes have the same ones; ValueError if not."""
    if num_processes() > 1:
        cure = "all machines need the same images under the same path"
        check_same(f"{len(source)} images ({source.fingerprint()})", "sees", cure)
    return source


def resolve_preprocess(
    config: PretrainConfig,
    source: Source,
    checkpoint: Checkpoint | None,
    console: Console,
    start: Start | None = None,
) -> Preprocess:
    """The checkpoint's preprocessing; else the first that there is: the configured mean and std, those of the weights
    it starts from, ImageNet's (3 channels), measured ones. The size is always the configured one.
    """
    if checkpoint is not None:
        return checkpoint.preprocess()
    mean, std = config.mean, config.std
    theirs = start.weights.preprocess if start is not None else None
    if mean is None and theirs is not None and theirs.in_chans == config.in_chans:
        mean, std = theirs.mean, theirs.std
    if mean is not None and std is not None:
        warning = range_warning(source)
    elif config.in_chans == 3:
        mean, std, warning = IMAGENET_MEAN, IMAGENET_STD, range_warning(source)
    else:
        mean, std, warning = measure_stats(source)
    if warning is not None:
        console.warn(warning)
    return preprocess_with(config, mean, std)


def preprocess_with(config: PretrainConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
    """The preprocessing of a configuration, with this mean and std."""
    value_range = (config.value_range[0], config.value_range[1]) if config.value_range is not None else None
    return Preprocess(config.size, config.in_chans, mean, std, value_range, config.nodata, config.alpha)


def warn_of_other_ranges(model: MaskedImageModel, start: Start | None, console: Console) -> None:
    """Warn if the weights that a run starts from, or its teacher, know images scaled by another value range."""
    known = {} if start is None else {f"--init {start.weights.source}": start.weights.preprocess}
    known |= {f"--teacher {t.source}": t.preprocess for t in model.modules() if isinstance(t, TeacherTarget)}
    own = known_preprocess(model.encoder).value_range
    for name, theirs in known.items():
        if theirs is not None and theirs.value_range not in (None, own):
            low, high = theirs.value_range
            console.warn(
                f"{name} was trained with --value-range {low:g} {high:g}, this run has "
                f"{'none' if own is None else f'{own[0]:g} {own[1]:g}'}, so it sees other brightnesses; give the same "
                "for images of the same kind"
            )


def mean_source(config: PretrainConfig, start: Start) -> str:
    """A line about what comes from the weights that a run starts from: mean and std, and settings left to them."""
    theirs = start.weights.preprocess
    if config.mean is not None:
        origin = "as given"
    elif theirs is not None and theirs.in_chans == config.in_chans:
        origin = "of the weights"
    else:
        known = "the weights have none" if theirs is None else f"the weights are for {theirs.in_chans} channels"
        origin = f"ImageNet's ({known})" if config.in_chans == 3 else f"measured ({known})"
    words = {"encoder": "encoder", "img_size": "image size", "in_chans": "channels"}
    left = ", ".join(word for name, word in words.items() if name in start.settings)
    return f"mean and std {origin}" + (f"; {left} of the weights" if left else "")
