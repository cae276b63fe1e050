"""Export of a trained encoder to other libraries. Outputs are compared with the encoder's before a file is written."""

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from dmjd.config.checks import check_out, check_path, check_text
from dmjd.encoders.base import Encoder
from dmjd.encoders.weights import encoder_bytes, encoder_metadata, load_encoder
from dmjd.files import METADATA_KEY, atomic, check_writable, make_folder, write_bytes
from dmjd.interop.conversion import timm_call
from dmjd.nn.modes import own_defaults
from dmjd.suggest import did_you_mean

FORMATS = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx"}

TOLERANCE = 1e-4  # absolute and relative

_BATCHES = (1, 3)  # tested; different from the batch size of the export, to detect a fixed one


@dataclass(frozen=True)
class Exported:
    """An exported file, and Python code that loads it."""

    path: Path
    usage: str


@own_defaults()
def export(run: str | Path, *, format: str, out: str | Path) -> Exported:
    """Write an encoder in the format of another library.

    Args:
        run: a run folder, an encoder file or a checkpoint.
        format: "timm": weights that ``timm.create_model`` loads strictly with the arguments in ``usage`` (ViT only);
            "safetensors": the encoder with its configuration and preprocessing, for :func:`load_encoder`;
            "onnx": normalized images [B, C, H, W] of any B -> ``tokens`` [B, prefix + N, D], ``encoder(images)``, and
            ``features`` [B, D], ``encoder.pool(tokens)``.
        out: the file, ending in ``.safetensors`` or ``.onnx``.

    Raises:
        ValueError: if the format does not support the encoder, the ending is wrong, or outputs differ from the
            encoder's by more than 1e-4. No file is written then.
    """
    if check_text("format", format) not in FORMATS:
        raise ValueError(f"cannot export '{format}'{did_you_mean(format, FORMATS)} Formats: {', '.join(FORMATS)}")
    out, run = check_out("out", out), check_path("run", run)
    if out.suffix != FORMATS[format]:
        raise ValueError(f"--out {out}: a file of format {format} ends in {FORMATS[format]}")
    check_writable(out)
    encoder = load_encoder(run)
    make_folder(out.parent)
    return {"timm": _to_timm, "safetensors": _to_safetensors, "onnx": _to_onnx}[format](encoder, out)


def formats_of(encoder: Encoder) -> list[str]:
    """The formats of :func:`export` that support an encoder."""
    return [name for name in FORMATS if name != "timm" or encoder.timm_model() is not None]


def _to_safetensors(encoder: Encoder, out: Path) -> Exported:
    write_bytes(out, encoder_bytes(encoder))
    return Exported(out, f'import dmjd\n\nencoder = dmjd.load_encoder("{out}")')


def _to_timm(encoder: Encoder, out: Path) -> Exported:
    """Write the encoder's own file: its parameters have timm's names."""
    name, arguments = timm_call(encoder)
    model = cast(VisionTransformer, timm.create_model(name, **arguments)).eval()
    model.load_state_dict(encoder.state_dict())
    images = _random_images(encoder, 2)
    with torch.inference_mode():
        theirs, ours = model.forward_features(images), encoder.forward_features(images)
    _check_close("timm's tokens", theirs.numpy(), ours.numpy())
    write_bytes(out, encoder_bytes(encoder))
    lines = [f"    {name!r},", f"    checkpoint_path={str(out)!r},"]
    lines += [f"    {key}={value!r}," for key, value in arguments.items()]
    return Exported(out, "\n".join(["import timm", "", "model = timm.create_model(", *lines, ")"]))


class _TokensAndFeatures(nn.Module):
    """The function that is exported to ONNX."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, prefix + N, D], [B, D]."""
        tokens = self.encoder(images)
        return tokens, self.encoder.pool(tokens)


def _to_onnx(encoder: Encoder, out: Path) -> Exported:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the onnx format needs {' and '.join(missing)}: pip install 'dmjd[onnx]'")
    model = _TokensAndFeatures(encoder).eval()
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)  # it warns of every node that it leaves alone
    program = torch.onnx.export(
        model,
        (_random_images(encoder, 2),),
        dynamo=True,
        input_names=["images"],
        output_names=["tokens", "features"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = json.dumps(encoder_metadata(encoder), sort_keys=True)
    with atomic(out) as temporary:
        program.save(temporary, external_data=False)
        _check_onnx(temporary, model)
    lines = [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{out}")',
        f"# images: float32 [B, {encoder.in_chans}, {encoder.img_size[0]}, {encoder.img_size[1]}]{_scaling(encoder)}",
        'tokens, features = session.run(None, {"images": images})',
    ]
    return Exported(out, "\n".join(lines))


def _scaling(encoder: Encoder) -> str:
    """A comment on how to normalize pixel values; empty if the preprocessing is unknown."""
    if (preprocess := encoder.preprocess) is None:
        return ""
    mean, std = ([round(value, 4) for value in values] for values in (preprocess.mean, preprocess.std))
    return f": 0..255, divided by 255, minus {mean}, divided by {std}"


def _check_onnx(file: Path, model: _TokensAndFeatures) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in _BATCHES:
        images = _random_images(model.encoder, batch)
        with torch.inference_mode():
            expected = model(images)
        for name, ours, theirs in zip(
            ("tokens", "features"), expected, session.run(None, {"images": images.numpy()}), strict=True
        ):
            _check_close(f"the ONNX file's {name}", np.asarray(theirs), ours.numpy())


def _check_close(name: str, theirs: np.ndarray, ours: np.ndarray) -> None:
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE):
        same_shape = theirs.shape == ours.shape
        gap = f"by up to {np.abs(theirs - ours).max():.1e}" if same_shape else f"in shape {theirs.shape}"
        raise ValueError(f"{name} differ from the encoder's {gap}; nothing was written")


def _random_images(encoder: Encoder, batch: int) -> Tensor:
    """Random normalized images, the same at each call; torch's global generator is not used."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, encoder.in_chans, *encoder.img_size, generator=generator)
