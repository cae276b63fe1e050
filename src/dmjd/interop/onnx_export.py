"""Export to ONNX."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import torch

from dmjd.encoders.base import Encoder
from dmjd.encoders.stored import encoder_metadata
from dmjd.files import METADATA_KEY, atomic
from dmjd.interop.exported import BATCHES, Exported, TokensAndFeatures, check_close, images_comment, program_images


def check_onnx_installed() -> None:
    """ValueError if a package is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the onnx format needs {' and '.join(missing)}: pip install 'dmjd[onnx]'")


def to_onnx(encoder: Encoder, out: Path) -> Exported:
    """Write the encoder as a model for onnxruntime, which is compared with it first."""
    model = TokensAndFeatures(encoder).eval()
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)  # it warns of every node that it leaves alone
    program = torch.onnx.export(
        model,
        (program_images(encoder, 2),),
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
        check_onnx(temporary, model)
    lines = [
        "import onnxruntime",
        "",
        f"session = onnxruntime.InferenceSession({str(out)!r})",
        images_comment(encoder),
        'tokens, features = session.run(None, {"images": images})',
    ]
    return Exported(out, "\n".join(lines))


def check_onnx(file: Path, model: TokensAndFeatures) -> None:
    """Compare a file with the encoder; ValueError if they differ."""
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        images = program_images(model.encoder, batch)
        with torch.inference_mode():
            expected = model(images)
        for name, ours, theirs in zip(
            ("tokens", "features"), expected, session.run(None, {"images": images.numpy()}), strict=True
        ):
            check_close(f"the ONNX file's {name}", np.asarray(theirs), ours.numpy())
