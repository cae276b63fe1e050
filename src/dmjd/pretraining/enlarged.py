"""A warning about images that are much smaller than the input of the encoder."""

from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.base import Source
from dmjd.data.statistics import typical_size
from dmjd.engine.console import Console

ENLARGED = 4  # warn if the input has more than this many times the pixels of an image


def warn_enlarged(config: PretrainConfig, source: Source, console: Console) -> None:
    """Warn if images are much smaller than the input: each step costs more, but enlarging adds no detail."""
    (H, W), (h, w) = config.size, typical_size(source) or config.size
    times = H * W / (h * w)
    if times > ENLARGED:
        console.warn(
            f"images of about {h} x {w} are enlarged to {H} x {W}: a step works on {times:.0f} times the pixels "
            "they have; --img-size sets the side"
        )
