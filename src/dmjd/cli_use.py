"""Commands that use a trained encoder: ``dmjd embed``, ``dmjd export``, ``dmjd compare``."""

from collections.abc import Sequence

from dmjd.cli_parser import Parser, add_run_arguments

_ENCODER_SOURCE = "run folder, encoder.safetensors or checkpoint"


def run_embed(arguments: Sequence[str]) -> None:
    """``dmjd embed``: see :func:`dmjd.embed`."""
    parser = Parser(
        prog="dmjd embed",
        usage="dmjd embed RUN --data SOURCE --out FILE.parquet|FILE.npy [flags]",
        description="Write the features of every picture to a table; after a kill the same command goes on.",
        epilog="examples:\n"
        "  dmjd embed runs/first --out features.parquet\n"
        "  dmjd embed runs/mine --data ~/pictures --out tokens.npy --tokens --half",
    )
    add_run_arguments(parser, _ENCODER_SOURCE)
    parser.add_argument("--out", metavar="FILE", required=True, help="FILE.parquet, or FILE.npy and FILE.rows.parquet")
    parser.add_argument(
        "--split", default="train", choices=("train", "test"), help="part of data that has both (train)"
    )
    parser.add_argument("--labels", choices=("none", "folder", "column"), help="where labels come from (the run's)")
    parser.add_argument("--tokens", action="store_true", help="all patch tokens, not one pooled feature a picture")
    parser.add_argument("--half", action="store_true", help="store float16: half the disk")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="pictures at a time (256)")
    parser.add_argument("--precision", default="fp32", metavar="{fp32,bf16}", help="of the computation (fp32)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="loader processes (by the cores)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu or cuda (auto)")
    given = vars(parser.parse(arguments))
    from dmjd.embedding import embed

    print(embed(given.pop("run"), **given))


def run_export(arguments: Sequence[str]) -> None:
    """``dmjd export``: see :func:`dmjd.exporting.export`."""
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
    from dmjd.exporting import export

    exported = export(given.pop("run"), **given)
    print(f"{exported.path} gives the encoder's outputs. Load it by:\n\n{exported.usage}")


def run_compare(arguments: Sequence[str]) -> None:
    """``dmjd compare``: see :func:`dmjd.comparison.compare`."""
    parser = Parser(
        prog="dmjd compare",
        usage="dmjd compare RUN RUN ... [--out PICTURE.png]",
        description="Set the evaluations of several runs, and the settings in which they differ, side by side.",
        epilog="example:\n  dmjd compare runs/first runs/second --out compare.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder with evaluation/*.json")
    parser.add_argument("--out", metavar="FILE", help="bar picture (none)")
    given = vars(parser.parse(arguments))
    from dmjd.comparison import compare, comparison_tables
    from dmjd.progress import Console

    for table in comparison_tables(compare(*given["runs"], out=given["out"])):
        Console().table(table)
