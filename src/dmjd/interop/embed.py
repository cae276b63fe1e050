"""Features of every image of a set as a table, written in parts so that a killed run resumes.

Shapes: b image of a batch, N patch token, D width.
"""

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmjd.config.checks import check_bool, check_out, check_path
from dmjd.config.evaluation import FrozenConfig, LabeledConfig
from dmjd.data.eval_loader import EvalLoader
from dmjd.data.sources.base import Source
from dmjd.data.statistics import warn_of_range
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.stored import weights_hash
from dmjd.encoders.weights import load_encoder
from dmjd.engine.console import Console, duration_text
from dmjd.engine.device import keep_freed_memory, pick_device
from dmjd.evaluation.frozen.features import Extractor, pooled
from dmjd.files import check_writable, make_folder, try_lock
from dmjd.interop.embed_columns import SecondPass
from dmjd.interop.embed_parts import Parts, parts_folder
from dmjd.interop.feature_files import check_finished, feature_rows, feature_schema
from dmjd.nn.modes import evaluating, own_defaults
from dmjd.runs.build import open_images

ENDINGS = (".parquet", ".npy")


@own_defaults()
def embed(
    run: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    split: str = "train",
    labels: str | None = None,
    tokens: bool = False,
    half: bool = False,
    duplicates: float | None = None,
    distances: bool = False,
    deduplicate: float | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    num_workers: int | None = None,
    **lists: Any,
) -> Path:
    """Write the features of every image of a set to a file.

    Rows are in the order of the set; unreadable images are left out and reported. Finished parts are kept in
    ``<out>.parts`` until the file is complete: the same call resumes from them, also after an error or interruption.

    Args:
        run: a run folder; or an encoder file or checkpoint, together with ``data``.
        out: ``.parquet`` for columns ``index``, ``path``, ``label`` (int64) and ``class`` of labeled sets, and
            ``features``; ``.npy`` for the features alone, with the other columns in ``<name>.rows.parquet``.
        data, split, labels: the images, a part ("train", "val", "test"), "none", "folder" or "column"; None: the run's.
        tokens: write all patch tokens [N, D] in raster order, not the pooled feature [D].
        half: store float16, not float32.
        duplicates: add a column ``duplicate_of``, the path of the first image that an image is a near duplicate of, or
            "": their centered cosine is at least this; see :func:`~dmjd.similarity.near_duplicates`.
        distances: add a column ``distance``, 1 less the centered cosine with the nearest neighbor.
        deduplicate: also write the images without near duplicates, by such a cosine, in a form that ``data`` takes:
            ``NAME.keep.txt``, or ``NAME.keep.parquet`` for tables. Unreadable images are left out.
        batch_size, num_workers: images per batch; data loading processes (None: by the number of cores).
        precision, device: "fp32" or "bf16" (autocast); "auto", "cpu" or "cuda".
        lists: ``label_column``, ``path_column``, ``root`` and ``max_unreadable`` of a list, as in ``open_source``;
            ``cache_dir`` and ``cache_gb`` of a remote set.

    Returns:
        The file. The schema of the parquet file holds settings and unreadable images as JSON, under ``dmjd``.

    Raises:
        ValueError: for a wrong ending, existing files with other settings, unusable data or non-finite features.
    """
    out, run = _checked_out(out), check_path("run", run)
    machine = {"precision": precision, "device": device, "num_workers": num_workers}
    _check(tokens, half, batch_size=batch_size, **machine)
    given = LabeledConfig.of_images(data, split, labels, lists)
    wanted = SecondPass(duplicates, distances, deduplicate)
    keep_freed_memory(chosen := pick_device(device))
    encoder = load_encoder(run, chosen)
    source = _open(run, encoder, given)
    wanted.check(source, split, tokens)
    settings = _settings(encoder, source) | {"tokens": bool(tokens), "half": bool(half), "precision": precision}
    console = Console()
    _embed(encoder, source, _extractor(encoder, tokens, precision), out, settings, console, batch_size, num_workers)
    wanted.run(out, source, chosen, console)
    return out


def _settings(encoder: Encoder, source: Source) -> dict[str, Any]:
    """What the features depend on, besides how they are stored."""
    data = {"data": source.fingerprint(), "labels": source.labels is not None, "content": source.content_hash()}
    return {"encoder": weights_hash(encoder)} | data


def _embed(
    encoder: Encoder,
    source: Source,
    extract: Extractor,
    out: Path,
    settings: dict[str, Any],
    console: Console,
    batch_size: int,
    num_workers: int | None,
) -> None:
    """Write the features, unless they are there."""
    if _is_finished(settings, out, console):
        return
    shape = (encoder.num_patches, encoder.embed_dim) if settings["tokens"] else (encoder.embed_dim,)
    with Parts(out, settings, feature_schema(source, shape, settings["half"])) as parts:
        if out.exists():  # by another process, just now
            check_finished(settings, out)
            parts.drop()
        while not parts.dropped:
            _fill(parts, encoder, source, extract, console, batch_size, num_workers)
            parts.finish(source.name, {"settings": settings, "grid": encoder.grid}, console)


def _check(tokens: bool, half: bool, **settings: Any) -> None:
    """Check the types and values of arguments of :func:`embed`."""
    check_bool("tokens", tokens)
    check_bool("half", half)
    FrozenConfig(**settings)


def _checked_out(out: str | Path) -> Path:
    """The path of a file that can be written."""
    out = check_out("out", out)
    if out.suffix not in ENDINGS:
        raise ValueError(f"--out {out}: end it in {' or '.join(ENDINGS)}")
    if not out.is_file():
        check_writable(out)
        make_folder(out.parent)
    return out


def _open(run: Path, encoder: Encoder, given: Mapping[str, Any]) -> Source:
    """The images; with a warning if they are not the run's own, and use little of the range of values."""
    source = open_images(run, known_preprocess(encoder), **given)
    if source.split != given["split"]:
        Console().warn(f"{source.title} serves as the {given['split']} part, as there is no other one")
    if "data" in given:
        warn_of_range(source)
    return source


def _is_finished(settings: dict[str, Any], out: Path, console: Console) -> bool:
    """Whether the file exists with these settings; ValueError for others. Parts that a kill left are deleted."""
    if not out.exists():
        return False
    check_finished(settings, out)
    console.say(f"{out} is finished already")
    folder = parts_folder(out)
    if folder.is_dir():
        with contextlib.suppress(OSError):
            lock = try_lock(folder / ".lock")
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()
    return True


def _extractor(encoder: Encoder, tokens: bool, precision: str) -> Extractor:
    """Normalized images [b, C, H, W] -> [b, D], or [b, N, D] of the patch tokens; float32."""
    pool = pooled(encoder, precision)

    def patch_tokens(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return encoder(images)[:, encoder.num_prefix_tokens :].float()

    return patch_tokens if tokens else pool


def _fill(
    parts: Parts,
    encoder: Encoder,
    source: Source,
    extract: Extractor,
    console: Console,
    batch_size: int,
    num_workers: int | None,
) -> None:
    """Compute the missing features, in the order of the set."""
    gaps, started, computed = parts.gaps(len(source)), time.monotonic(), 0
    if gaps and parts.files():
        console.say(f"resuming from image {gaps[0][0]} of {len(source)}")
    left = sum(last - first for first, last in gaps)
    preprocess, device = known_preprocess(encoder), next(encoder.parameters()).device
    for first, last in gaps:
        loader = EvalLoader(source, preprocess, batch_size, num_workers, np.arange(first, last))
        parts.begin(first)
        with evaluating(encoder), contextlib.closing(console):
            for batch in loader:
                x = extract(preprocess.normalize(batch.raw.to(device)))
                end = first + ((int(batch.index[0]) - first) // batch_size + 1) * batch_size  # of the batch's range
                stop = min(last, end)
                parts.add(feature_rows(source, batch.index, x, parts.schema), loader.unreadable, stop)
                parts.save_if_due()
                done = computed + stop - first
                rate = done / max(1e-9, time.monotonic() - started)
                console.line(
                    f"{stop} of {len(source)} images  {rate:.0f} images/s  left {duration_text((left - done) / rate)}",
                    (len(source) - left + done) / len(source),
                )
            parts.add(parts.schema.empty_table(), loader.unreadable, last)
            parts.save()
        computed += last - first
