"""A fine-tuned classifier: an encoder with a head, its classes and preprocessing, as one file."""

import json
import math
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dmjd.encoders.base import Encoder
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.weights import encoder_metadata
from dmjd.files import METADATA_KEY
from dmjd.images.decoding import ImageLike
from dmjd.images.preprocess import Preprocess
from dmjd.nn.layers import TransformerNorm


class Classifier(nn.Module):
    """An encoder with a fine-tuned head: mean over patch tokens, ``fc_norm`` with affine, linear.

    Args:
        encoder: the encoder. num_classes: classes.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc_norm = TransformerNorm(encoder.embed_dim)
        self.head = nn.Linear(encoder.embed_dim, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] normalized -> [B, D], what the head sees."""
        return self.fc_norm(self.encoder.mean_patch_token(self.encoder(images)))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] normalized -> logits [B, classes]."""
        return self.head(self.forward_features(images))


CLASSIFIER_FILE = "classifier.safetensors"

HEAD_STD = 2e-5  # of the head's initial weights, as published: fine-tuning starts from equal scores


class ImageClassifier(Classifier):
    """A :class:`~dmjd.encoders.classifier.Classifier` that knows its classes and its preprocessing.

    Args:
        encoder: with ``preprocess`` set. classes: their names, in the order of the logits.
        test_crop: share of each side that is kept of an image resized for the encoder.
    """

    def __init__(self, encoder: Encoder, classes: list[str], test_crop: float = 1.0) -> None:
        super().__init__(encoder, len(classes))
        self.classes, self.test_crop = list(classes), test_crop

    def init_head(self, seed: int) -> None:
        """Fresh head: weights normal with std 2e-5, drawn from the seed alone, biases zero."""
        nn.init.normal_(self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    @property
    def test_preprocess(self) -> Preprocess:
        """What resizes test images, before :meth:`crop` cuts the center out."""
        return enlarged(self.encoder.preprocess, self.test_crop)

    def crop(self, images: Tensor) -> Tensor:
        """The center of images resized for the test: [B, C, H', W'] -> [B, C, H, W]."""
        (H, W), (h, w) = images.shape[-2:], self.encoder.img_size
        top, left = (H - h) // 2, (W - w) // 2
        return images[..., top : top + h, left : left + w]

    def predict(self, image: ImageLike) -> list[tuple[str, float]]:
        """(class, probability) of one image, the most likely first.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        device = self.head.weight.device
        with torch.inference_mode():
            share = self(self.crop(self.test_preprocess(image).to(device))).softmax(1)[0]
        order = share.argsort(descending=True).tolist()
        return [(self.classes[i], float(share[i])) for i in order]


def enlarged(preprocess: Preprocess | None, test_crop: float) -> Preprocess:
    """The same preprocessing to a size of which the encoder's is a share ``test_crop`` (256 of 224 at 0.875)."""
    assert preprocess is not None
    fields = preprocess.to_dict() | {"img_size": [math.floor(s / test_crop) for s in preprocess.img_size]}
    return Preprocess.from_dict(fields)


def classifier_bytes(model: ImageClassifier) -> bytes:
    """The classifier as a safetensors file; one JSON metadata key makes it again."""
    metadata = encoder_metadata(model.encoder) | {"classes": model.classes, "test_crop": model.test_crop}
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    return save(state, metadata={METADATA_KEY: json.dumps({"classifier": metadata}, sort_keys=True)})


def load_classifier(source: str | Path, device: torch.device | str = "cpu") -> ImageClassifier:
    """Load a fine-tuned classifier in evaluation mode.

    Args:
        source: a run folder in which ``dmjd evaluate finetune`` has finished, or a ``classifier.safetensors``.
        device: where to put it.

    Returns:
        a module, normalized images [B, C, H, W] -> logits [B, classes], with ``classes`` and ``predict(image)``.

    Raises:
        ValueError: naming what is wrong with the source.
    """
    path = Path(source).expanduser()
    file = path / "evaluation" / "finetune" / CLASSIFIER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no {file}: fine-tune first (dmjd evaluate finetune {source} --data ...)")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        state = load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); it may be cut short") from None
    metadata: dict[str, Any] = json.loads(text).get("classifier", {}) if text is not None else {}
    if not metadata:
        raise ValueError(f"{file} is no classifier of dmjd; dmjd.load_encoder reads encoders")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["options"].items()}
    encoder = create_encoder(metadata["name"], **options)
    encoder.preprocess = Preprocess.from_dict(metadata["preprocess"])
    model = ImageClassifier(encoder, metadata["classes"], metadata["test_crop"])
    model.load_state_dict(state)
    return model.eval().to(device)
