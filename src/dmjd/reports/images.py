"""The images of a report: figures of the method and of the encoder, and rows of thumbnails."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from dmjd.encoders.base import known_preprocess
from dmjd.figures.attention import attention_figure
from dmjd.figures.kinds import MODEL_KINDS
from dmjd.figures.show import method_figure, some_images
from dmjd.reports.clock import Clock
from dmjd.reports.relations import Neighbors, find_neighbors, near_duplicates, outliers
from dmjd.reports.sample import Sample, data_uri, thumbnails
from dmjd.reports.trained import Trained
from dmjd.text import printable, shortened
from dmjd.whitening import HalfWhitening

NUM_IMAGES = 4  # in a figure

_FOR_COMPONENTS = 64  # images used to compute principal components

_ALT = {
    "masks": f"{NUM_IMAGES} images and their masked views; masked tokens are gray",
    "targets": f"{NUM_IMAGES} images and what the model learns to predict of them",
    "reconstructions": "Visible tokens, targets and predictions of a few images",
}

_WIDEST = 1600  # pixels of a figure

_QUALITY = 82  # of WebP

_QUERIES, _SHOWN = 6, 7  # queries, and neighbors of each

_PAIRS, _OUTLIERS = 12, 16

_LONGEST = 40  # characters below a thumbnail

NO_TIME = "there was no time for it at the end of this run; dmjd report makes it"


@dataclass(frozen=True)
class Shown:
    """An image of the report: a data URI, its alternative text, its size in pixels, and what it shows."""

    uri: str
    alt: str
    width: int
    height: int
    caption: str = ""


@dataclass(frozen=True)
class Thumb:
    """A thumbnail with a text below it; ``same`` tells whether its class is the query's, None without classes."""

    uri: str
    alt: str
    text: str
    same: bool | None = None


def rendered(figure: Figure, alt: str, caption: str = "") -> Shown:
    """A figure of matplotlib as WebP."""
    for text in figure.findobj(Text):
        text.set_usetex(False)  # whatever the user's own settings are: LaTeX would read names as code
    file = io.BytesIO()
    with rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of characters that the font lacks
        figure.savefig(file, format="png")
    return _as_webp(file, alt, caption)


def image_file(file: Path, alt: str, caption: str = "") -> Shown:
    """An image file of a run folder as WebP.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return _as_webp(io.BytesIO(file.read_bytes()), alt, caption)
    except Exception as error:  # damaged files raise nearly everything in a decoder
        raise ValueError(f"{file} cannot be read: {reason_of(error)}") from None


def _as_webp(file: io.BytesIO, alt: str, caption: str) -> Shown:
    with Image.open(file, formats=["PNG"]) as opened:
        image = opened.convert("RGB")
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, max(1, round(image.height * _WIDEST / image.width))))
    written = io.BytesIO()
    image.save(written, "WEBP", quality=_QUALITY, method=2)
    return Shown(data_uri(written.getvalue(), "image/webp"), alt, image.width, image.height, caption)


def newest_reconstruction(run: Path) -> Shown | None:
    """The newest reconstruction figure that the training wrote; None if there is none that can be read."""
    files = [*(run / "figures").glob("final.png"), *(run / "figures").glob("step-*.png")]
    for file in sorted(files, key=lambda file: -file.stat().st_mtime):
        step = file.stem.removeprefix("step-").lstrip("0")
        when = "at the end of the run" if file.stem == "final" else f"at step {step or 0}"
        try:
            return image_file(file, f"{_ALT['reconstructions']}, {when}", when)
        except ValueError:
            continue
    return None


def method_figures(
    trained: Trained, existing: Shown | None, clock: Clock, seed: int
) -> tuple[dict[str, Shown], dict[str, str]]:
    """Figures of masks, targets and reconstructions by name, and the reasons for those that are missing."""
    shown: dict[str, Shown] = {} if existing is None else {"reconstructions": existing}
    problems: dict[str, str] = {}
    for kind in MODEL_KINDS[::-1]:
        if kind not in shown:
            attempt(kind, partial(_method_figure, trained, kind, seed), shown, problems, clock)
    return shown, problems


def _method_figure(trained: Trained, kind: str, seed: int) -> Shown:
    return rendered(method_figure(kind, trained.model, trained.source, NUM_IMAGES, seed), _ALT[kind])


def attempt(
    name: str, make: Callable[[], Shown], shown: dict[str, Shown], problems: dict[str, str], clock: Clock
) -> None:
    """Make a figure if there is time; a failure is a reason for its absence."""
    if clock.left <= 0:
        problems[name] = NO_TIME
        return
    try:
        shown[name] = make()
    except Exception as error:  # of any library that takes part: the rest of the report is of use without it
        problems[name] = reason_of(error)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def attention_shown(trained: Trained, seed: int) -> Shown:
    """Attention and principal components of a few images."""
    encoder = trained.encoder
    raw, _ = some_images(trained.source, known_preprocess(encoder), _FOR_COMPONENTS, seed)
    figure = attention_figure(encoder, raw.to(next(encoder.parameters()).device), NUM_IMAGES)
    return rendered(figure, f"{NUM_IMAGES} images, principal components of their tokens, and attention maps")


@dataclass(frozen=True)
class Gallery:
    """Rows of thumbnails: neighbors of some images, pairs of near duplicates, and outliers."""

    neighbors: list[list[Thumb]]
    duplicates: list[list[Thumb]]
    outliers: list[Thumb]
    compared: int
    num_duplicates: int


def gallery(sample: Sample) -> tuple[Gallery, Neighbors]:
    """Neighbors, near duplicates and outliers of a sample.

    Raises:
        ValueError: for fewer than two images.
    """
    if len(sample.features) < 2:
        raise ValueError("a single image has no neighbors")
    centered = find_neighbors(sample.features)
    pairs, odd = near_duplicates(centered), outliers(centered, _OUTLIERS)
    found = find_neighbors(HalfWhitening.fit(sample.features)(sample.features))
    queries = range(min(_QUERIES, len(found.rows)))
    rows = {row for query in queries for row in (query, *found.rows[query, :_SHOWN].tolist())}
    rows |= {row for pair in pairs[:_PAIRS] for row in pair[:2]} | {row for row, _ in odd}
    uris, names, labels = thumbnails(sample, rows), sample.names, sample.labels

    def thumb(row: int, number: float | None = None, query: int | None = None) -> list[Thumb]:
        if row not in uris:
            return []
        kind = sample.source.class_of(int(sample.index[row]))
        text = " · ".join(part for part in ("" if number is None else f"{number:.2f}", kind) if part)
        same = None
        if labels is not None and query is not None and min(labels[row], labels[query]) >= 0:  # both have a class
            same = bool(labels[row] == labels[query])
        return [Thumb(uris[row], shortened(f"{names[row]} {kind}".strip(), 200), shortened(text, _LONGEST), same)]

    shown_neighbors = [
        [
            *thumb(query),
            *(
                one
                for row, cosine in zip(found.rows[query, :_SHOWN].tolist(), found.cosines[query].tolist(), strict=False)
                for one in thumb(row, cosine, query)
            ),
        ]
        for query in queries
    ]
    shown_pairs = [[*thumb(one), *thumb(other, cosine)] for one, other, cosine in pairs[:_PAIRS]]
    shown_odd = [one for row, cosine in odd for one in thumb(row, cosine)]
    return Gallery(shown_neighbors, shown_pairs, shown_odd, len(found.rows), len(pairs)), found
