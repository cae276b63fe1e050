"""Commands that use a trained encoder: ``dmjd show``, ``embed``, ``export``, ``compare`` and ``report``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dmjd.cli.parser import Parser, add_field, add_run_argument
from dmjd.config.evaluation import LabeledConfig
from dmjd.config.fields import (
    CACHE_SETTINGS,
    DEVICES,
    FEATURE_PRECISIONS,
    LABELS,
    LIST_SETTINGS,
    NEAR_DUPLICATE,
    SPLITS,
)
from dmjd.figures.kinds import KINDS, check_kind
from dmjd.text import printable

EXPORT_FORMATS = ("timm", "hf", "torch", "onnx", "safetensors", "hub")

_ENCODER_SOURCE = "run folder, encoder file or checkpoint"


def run_show(arguments: Sequence[str]) -> None:
    """``dmjd show``: see :func:`dmjd.show`."""
    parser = Parser(
        prog="dmjd show",
        usage=f"dmjd show {{{','.join(KINDS)}}} RUN [--out FIGURE.png] [flags]",
        description="Draw a figure of a run: masks, targets and reconstructions of its model; attention maps of its\n"
        "encoder; or images of a set that its encoder finds similar: nearest neighbors, near duplicates,\n"
        "outliers and clusters. The similarity is the cosine of pooled features, less the mean feature.",
        epilog="examples:\n"
        "  dmjd show neighbors runs/first --query photo.jpg --out neighbors.png\n"
        "  dmjd show duplicates runs/mine --data ~/images --out duplicates.png\n"
        "  dmjd show reconstructions runs/first --out figure.png",
    )
    parser.add_argument("kind", metavar="KIND", help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}")
    add_run_argument(parser, "run folder")
    _add_data(parser)
    parser.add_argument("--out", metavar="FILE", default="figure.png", help="figure to write (figure.png)")
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="images, queries, groups of duplicates, rows of outliers (4); images of each cluster (8)",
    )
    _add_labels(parser, "figures of a set: source of the class labels; default that of the run")
    parser.add_argument(
        "--num-candidates",
        type=int,
        metavar="N",
        help="images of the set to search, evenly spaced; default 2000 for neighbors, else 20000",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the images, masks and clusters (0)")
    parser.add_argument(
        "--query", nargs="+", default=(), metavar="FILE", help="neighbors: of these images, not of some of the set"
    )
    parser.add_argument("--threshold", type=float, metavar="X", help="duplicates: smallest cosine (0.95)")
    parser.add_argument(
        "--num-neighbors", type=int, metavar="N", help="outliers: neighbors whose mean distance counts (5, or all)"
    )
    parser.add_argument("--num-clusters", type=int, metavar="N", help="clusters: default 2 to 12, by the set's size")
    given = parser.parse(arguments)
    kind = given.pop("kind")
    check_kind(kind)
    from dmjd.figures.show import show  # imports torch

    print(printable(show(kind, given.pop("run"), **given)))


def run_embed(arguments: Sequence[str]) -> None:
    """``dmjd embed``: see :func:`dmjd.embed`."""
    cosine: dict[str, Any] = {"nargs": "?", "const": NEAR_DUPLICATE, "type": float, "metavar": "COSINE"}
    parser = Parser(
        prog="dmjd embed",
        usage="dmjd embed RUN --out FILE.parquet|FILE.npy [--data SOURCE] [flags]",
        description="Write the features of every image to a table. Repeat an interrupted command to resume it.",
        epilog="examples:\n"
        "  dmjd embed runs/first --out features.parquet\n"
        "  dmjd embed runs/mine --data ~/images --out tokens.npy --tokens --half\n"
        "  dmjd embed runs/mine --out features.parquet --deduplicate 0.95",
    )
    add_run_argument(parser, _ENCODER_SOURCE)
    _add_data(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="FILE.parquet, or FILE.npy and FILE.rows.parquet")
    _add_labels(parser, "source of the labels; default that of the run")
    parser.add_argument("--tokens", action="store_true", help="all patch tokens, not one pooled feature per image")
    parser.add_argument("--half", action="store_true", help="store float16: half the size")
    parser.add_argument(
        "--duplicates",
        **cosine,
        help="column duplicate_of: path of the first image that an image is a near duplicate of, by the cosine of "
        "their features, less the mean feature (0.95)",
    )
    parser.add_argument(
        "--distances", action="store_true", help="column distance: 1 less this cosine with the nearest neighbor"
    )
    parser.add_argument(
        "--deduplicate",
        **cosine,
        help="write the images without near duplicates to FILE.keep.txt (.keep.parquet for tables), for --data (0.95)",
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch (256)")
    parser.add_argument(
        "--precision", default="fp32", metavar=_one_of(FEATURE_PRECISIONS), help="precision of the encoder (fp32)"
    )
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="data loading processes; default by the number of cores"
    )
    parser.add_argument("--device", default="auto", metavar=_one_of(DEVICES), help="device to run on (auto)")
    given = parser.parse(arguments)
    from dmjd.interop.embed import embed  # imports torch

    print(printable(embed(given.pop("run"), **given)))


def run_export(arguments: Sequence[str]) -> None:
    """``dmjd export``: see :func:`dmjd.export`."""
    parser = Parser(
        prog="dmjd export",
        usage=f"dmjd export RUN --format {_one_of(EXPORT_FORMATS)} --out PATH [--push USER/NAME]",
        description="Write the encoder for another library, check that its outputs agree, and print how to load it.",
        epilog="examples:\n"
        "  dmjd export runs/first --format timm --out vit\n"
        "  dmjd export runs/first --format torch --out encoder.pt2\n"
        "  dmjd export runs/first --format hub --out encoder --push me/encoder",
    )
    add_run_argument(parser, "run folder, encoder file, checkpoint or hf-hub:USER/NAME")
    parser.add_argument("--format", metavar=_one_of(EXPORT_FORMATS), required=True, help="format to write")
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="folder (timm, hf, hub), or FILE.{safetensors,pt2,onnx}"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="repository of the Hugging Face hub to upload a folder to")
    given = parser.parse(arguments)
    from dmjd.interop.export import export  # imports torch

    exported = export(given.pop("run"), **given)
    uploaded = "" if exported.address is None else f"Uploaded to {exported.address}\n"
    print(
        printable(
            f"{exported.path} reproduces the encoder's outputs. Load it with:\n\n{exported.usage}\n{uploaded}".rstrip(),
            keep="\n",
        )
    )


def run_compare(arguments: Sequence[str]) -> None:
    """``dmjd compare``: see :func:`dmjd.compare`."""
    parser = Parser(
        prog="dmjd compare",
        usage="dmjd compare RUN RUN ... [--out FIGURE.png]",
        description="Show the evaluations of several runs, and the settings in which they differ, side by side.",
        epilog="example:\n  dmjd compare runs/first runs/second --out compare.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder with evaluation/*.json")
    parser.add_argument("--out", metavar="FILE", help="bar chart to write; default none")
    given = parser.parse(arguments)
    from dmjd.engine.console import Console  # these import torch
    from dmjd.evaluation.compare import compare, comparison_tables

    for table in comparison_tables(compare(*given["runs"], out=given["out"])):
        Console().table(table)


def run_report(arguments: Sequence[str]) -> None:
    """``dmjd report``: see :func:`dmjd.report`."""
    parser = Parser(
        prog="dmjd report",
        usage="dmjd report RUN [RUN ...] [--out report.html] [flags]",
        description="Write a report on one or several runs, to read in a browser or to hand on: one HTML file, which\n"
        "loads nothing from elsewhere. A run may still be training. Needs pip install 'dmjd[report]'.",
        epilog="examples:\n"
        "  dmjd report runs/first --out report.html\n"
        "  dmjd report runs/first runs/second --out both.html --num-images 5000",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; figures and map are those of the first")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="file to write (report.html)")
    _add_data(parser)
    _add_labels(parser, "source of the class labels; default that of the run")
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="images in map and neighbors; 0: none (1000)"
    )
    parser.add_argument("--device", default="auto", metavar=_one_of(DEVICES), help="device to run on (auto)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the images (0)")
    given = parser.parse(arguments)
    from dmjd.reports.report import report  # imports torch

    print(printable(report(*given.pop("runs"), **given)))


def _add_data(parser: Parser) -> None:
    parser.add_argument("--data", metavar="SOURCE", help="images; default those of the run")
    parser.add_argument(
        "--split", default="train", choices=SPLITS, help="part of data that has several: train, val or test (train)"
    )
    for field in (
        field for field in dataclasses.fields(LabeledConfig) if field.name in (*LIST_SETTINGS, *CACHE_SETTINGS)
    ):
        add_field(parser, field, LabeledConfig())


def _add_labels(parser: Parser, text: str) -> None:
    parser.add_argument("--labels", choices=LABELS, help=text)


def _one_of(words: Sequence[str]) -> str:
    return "{" + ",".join(words) + "}"
