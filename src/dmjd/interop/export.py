"""Export of a trained encoder to other libraries. Outputs are compared with the encoder's before a file is written."""

import dataclasses
from pathlib import Path

from dmjd.config.checks import check_out, check_path, check_text
from dmjd.encoders.base import Encoder
from dmjd.encoders.folders import check_folder, write_folder
from dmjd.encoders.sharing import folder_files, push_files
from dmjd.encoders.stored import encoder_bytes
from dmjd.encoders.weights import load_encoder
from dmjd.files import check_writable, make_folder, write_bytes
from dmjd.hub import check_upload
from dmjd.interop.exported import Exported
from dmjd.interop.onnx_export import check_onnx_installed, to_onnx
from dmjd.interop.timm_export import check_timm_folder, timm_usage, to_timm_file
from dmjd.interop.torch_export import to_torch
from dmjd.interop.transformers_export import (
    check_transformers_installed,
    transformers_files,
    transformers_usage,
    why_not_transformers,
)
from dmjd.nn.modes import own_defaults
from dmjd.suggest import did_you_mean

# format -> the ending of its file; None = a folder. timm takes both.
FORMATS = {
    "timm": ".safetensors",
    "hf": None,
    "torch": ".pt2",
    "onnx": ".onnx",
    "safetensors": ".safetensors",
    "hub": None,
}

FOLDERS = ("timm", "hf", "hub")

_FILE_ENDINGS = {*filter(None, FORMATS.values()), ".pth", ".pt", ".bin", ".ckpt", ".json", ".npz", ".h5"}


@own_defaults()
def export(run: str | Path, *, format: str, out: str | Path, push: str | None = None) -> Exported:
    """Write an encoder in the format of another library.

    Args:
        run: a run folder, an encoder file, a checkpoint, or anything else that :func:`load_encoder` takes.
        format: one of
            "timm": weights of a ViT for ``timm.create_model``: a folder, which needs no arguments, or a file, which
            needs those of ``usage``;
            "hf": a folder for ``ViTModel`` and ``AutoModel`` of transformers (ViT with a class token);
            "torch": a program for ``torch.export.load``, without this library: normalized images [B, C, H, W] of any
            B -> ``tokens`` [B, prefix + N, D], ``encoder(images)``, and ``features`` [B, D], ``encoder.pool(tokens)``;
            if the preprocessing knows invalid pixels, they are NaN, and the features are those of ``encoder.encode``;
            "onnx": the same function as an ONNX model;
            "safetensors": the encoder with its configuration and preprocessing as one file, for :func:`load_encoder`;
            "hub": the same as a folder with a model card, as :meth:`Encoder.save_pretrained` writes it.
        out: the folder, or the file: ``.safetensors``, ``.pt2`` or ``.onnx``.
        push: ``user/name`` of a repository of the Hugging Face hub to upload the folder to.

    Raises:
        ValueError: if the format does not support the encoder, the ending is wrong, or outputs differ from the
            encoder's by more than 1e-4 (hf: 1e-5). No file is written then.
    """
    if check_text("format", format) not in FORMATS:
        raise ValueError(f"cannot export '{format}'{did_you_mean(format, FORMATS)} Formats: {', '.join(FORMATS)}")
    out, run = check_out("out", out), check_path("run", run)
    is_folder = _is_folder(format, out)
    if push is not None:
        if not is_folder:
            raise ValueError(f"--push uploads a folder: give --format {', '.join(FOLDERS)} and --out FOLDER")
        check_upload(push)
    check_folder(out) if is_folder else check_writable(out)
    if format == "onnx":
        check_onnx_installed()
    if format == "hf":
        check_transformers_installed()
    encoder = load_encoder(run)
    if not is_folder:
        make_folder(out.parent)
        return {"timm": to_timm_file, "safetensors": _to_safetensors, "onnx": to_onnx, "torch": to_torch}[format](
            encoder, out
        )
    exported, files = _folder(encoder, format, out, push)
    write_folder(out, files)
    return exported if push is None else dataclasses.replace(exported, address=push_files(push, files))


def formats_of(encoder: Encoder) -> list[str]:
    """The formats of :func:`export` that support an encoder."""
    without = {"timm"} if encoder.timm_model() is None else set()
    without |= {"hf"} if why_not_transformers(encoder) is not None else set()
    return [name for name in FORMATS if name not in without]


def _is_folder(format: str, out: Path) -> bool:
    """Whether a format writes a folder at a path; ValueError for the name of another kind of file."""
    ending = FORMATS[format]
    if format in FOLDERS and (out.is_dir() or out.suffix not in _FILE_ENDINGS):
        return True
    if ending is None:
        raise ValueError(f"--out {out}: format {format} writes a folder; give a name without {out.suffix}")
    if out.suffix != ending:
        folder = ", or give a folder" if format in FOLDERS else ""
        raise ValueError(f"--out {out}: a file of format {format} ends in {ending}{folder}")
    return False


def _folder(encoder: Encoder, format: str, out: Path, repo: str | None) -> tuple[Exported, dict[str, bytes]]:
    """How to load a folder, and its files; those for timm and transformers are compared with the encoder."""
    if format == "hf":
        return Exported(out, transformers_usage(str(out), encoder)), transformers_files(encoder, repo)
    files = folder_files(encoder, repo)
    if format == "timm":
        check_timm_folder(encoder, files)
        return Exported(out, timm_usage(out, encoder)), files
    return Exported(out, f"import dmjd\n\nencoder = dmjd.load_encoder({str(out)!r})"), files


def _to_safetensors(encoder: Encoder, out: Path) -> Exported:
    write_bytes(out, encoder_bytes(encoder))
    return Exported(out, f"import dmjd\n\nencoder = dmjd.load_encoder({str(out)!r})")
