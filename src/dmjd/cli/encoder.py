"""Commands that use a trained encoder: ``dmjd show``, ``embed``, ``export``, ``compare``."""

import difflib
from collections.abc import Sequence

from dmjd.cli.parser import Parser, add_run_arguments
from dmjd.cli.parser import Parser as _Parser
from dmjd.cli.parser import add_run_arguments as _add_run_arguments

KINDS = ("masks", "targets", "reconstructions", "attention", "neighbors")


def _show(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="dmjd show",
        usage="dmjd show {masks,targets,reconstructions,attention,neighbors} RUN --out FIGURE.png [flags]",
        description="Draw what a run's model sees, is asked for and answers; what its encoder attends to;\n"
        "which images it finds alike.",
        epilog="examples:\n"
        "  dmjd show neighbors runs/first --out neighbors.png\n"
        "  dmjd show reconstructions runs/first --out figure.png",
    )
    parser.add_argument("kind", metavar="KIND", help="masks, targets, reconstructions, attention or neighbors")
    _add_run_arguments(parser, "run folder")
    parser.add_argument("--out", metavar="FILE", default="figure.png", help="where the image goes (figure.png)")
    parser.add_argument("--num-images", type=int, default=4, metavar="N", help="images, or queries (4)")
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="neighbors: of classes (the run's)")
    parser.add_argument(
        "--num-candidates", type=int, default=2000, metavar="N", help="neighbors: images searched (2000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of images and masks (0)")
    given = vars(parser.parse(arguments))
    kind = given.pop("kind")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)
        raise ValueError(f"cannot show '{kind}'; did you mean '{near[0]}'? There are: {', '.join(KINDS)}")
    from dmjd.figures.show import show

    print(show(kind, given.pop("run"), **given))


_ENCODER_SOURCE = "run folder, encoder.safetensors or checkpoint"


def run_embed(arguments: Sequence[str]) -> None:
    """``dmjd embed``: see :func:`dmjd.embed`."""
    parser = Parser(
        prog="dmjd embed",
        usage="dmjd embed RUN --data SOURCE --out FILE.parquet|FILE.npy [flags]",
        description="Write the features of every image to a table; after a kill the same command goes on.",
        epilog="examples:\n"
        "  dmjd embed runs/first --out features.parquet\n"
        "  dmjd embed runs/mine --data ~/images --out tokens.npy --tokens --half",
    )
    add_run_arguments(parser, _ENCODER_SOURCE)
    parser.add_argument("--out", metavar="FILE", required=True, help="FILE.parquet, or FILE.npy and FILE.rows.parquet")
    parser.add_argument(
        "--split", default="train", choices=("train", "test"), help="part of data that has both (train)"
    )
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="where labels come from (the run's)")
    parser.add_argument("--tokens", action="store_true", help="all patch tokens, not one pooled feature an image")
    parser.add_argument("--half", action="store_true", help="store float16: half the disk")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time (256)")
    parser.add_argument("--precision", default="fp32", metavar="{fp32,bf16}", help="of the computation (fp32)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="loader processes (by the cores)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu or cuda (auto)")
    given = vars(parser.parse(arguments))
    from dmjd.interop.embed import embed

    print(embed(given.pop("run"), **given))


def run_export(arguments: Sequence[str]) -> None:
    """``dmjd export``: see :func:`dmjd.interop.export.export`."""
    parser = Parser(
        prog="dmjd export",
        usage="dmjd export RUN --format {timm,safetensors,onnx} --out FILE",
        description="Write the encoder for another program, compare its outputs, and print how to load it.",
        epilog="examples:\n"
        "  dmjd export runs/first --format timm --out vit.safetensors\n"
        "  dmjd export runs/first --format onnx --out vit.onnx",
    )
    parser.add_argument("run", metavar="RUN", help=_ENCODER_SOURCE)
    parser.add_argument("--format", metavar="{timm,safetensors,onnx}", required=True, help="what reads the file")
    parser.add_argument("--out", metavar="FILE", required=True, help="ends in .safetensors or .onnx")
    given = vars(parser.parse(arguments))
    from dmjd.interop.export import export

    exported = export(given.pop("run"), **given)
    print(f"{exported.path} gives the encoder's outputs. Load it by:\n\n{exported.usage}")


def run_compare(arguments: Sequence[str]) -> None:
    """``dmjd compare``: see :func:`dmjd.evaluation.compare.compare`."""
    parser = Parser(
        prog="dmjd compare",
        usage="dmjd compare RUN RUN ... [--out FIGURE.png]",
        description="Set the evaluations of several runs, and the settings in which they differ, side by side.",
        epilog="example:\n  dmjd compare runs/first runs/second --out compare.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder with evaluation/*.json")
    parser.add_argument("--out", metavar="FILE", help="bar image (none)")
    given = vars(parser.parse(arguments))
    from dmjd.engine.console import Console
    from dmjd.evaluation.compare import compare, comparison_tables

    for table in comparison_tables(compare(*given["runs"], out=given["out"])):
        Console().table(table)
