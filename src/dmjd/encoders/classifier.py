"""Fine-tuned classifiers: encoder, head, classes and preprocessing in one file."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from dmjd.checked_json import check_json, read_json
from dmjd.config.checks import check_path
from dmjd.encoders.base import Encoder, known_preprocess
from dmjd.encoders.stored import encoder_metadata
from dmjd.encoders.weights import build_encoder_of
from dmjd.files import read_digest, read_safetensors, safetensors_bytes
from dmjd.images.decoding import ImageLike
from dmjd.images.preprocess import Preprocess
from dmjd.nn.layers import TransformerNorm
from dmjd.nn.modes import own_defaults

CLASSIFIER_FILE = "classifier.safetensors"

CLASSIFIER_KEY = "classifier"  # in evaluation/finetune.json: the digest of the classifier file that belongs to it

HEAD_STD = 2e-5  # published standard deviation of the head's initial weights; scores are nearly equal at first


class HeadMetadata(TypedDict):
    """What the metadata of a classifier file holds besides that of the encoder."""

    classes: list[str]
    test_crop: float


class Classifier(nn.Module):
    """An encoder with a classification head: mean over patch tokens, LayerNorm, linear layer.

    Args:
        encoder: the encoder.
        num_classes: number of classes.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc_norm = TransformerNorm(encoder.embed_dim)
        self.head = nn.Linear(encoder.embed_dim, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] normalized -> input of the head [B, D]."""
        return self.fc_norm(self.encoder.mean_patch_token(self.encoder(images)))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] normalized -> logits [B, classes]."""
        return self.head(self.forward_features(images))


class ImageClassifier(Classifier):
    """A :class:`Classifier` with class names and preprocessing.

    Args:
        encoder: its ``preprocess`` must be set.
        classes: names in the order of the logits.
        test_crop: fraction of each side of a resized image that the center crop keeps.
    """

    def __init__(self, encoder: Encoder, classes: list[str], test_crop: float = 1.0) -> None:
        super().__init__(encoder, len(classes))
        self.classes, self.test_crop = list(classes), test_crop

    def init_head(self, seed: int) -> None:
        """Initialize the head: weights normal with std 2e-5 from the seed, biases zero."""
        nn.init.normal_(self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    @property
    def test_preprocess(self) -> Preprocess:
        """Preprocessing that resizes a test image to the size :meth:`crop` takes."""
        preprocess = known_preprocess(self.encoder)
        height, width = (math.floor(side / self.test_crop) for side in preprocess.img_size)
        return dataclasses.replace(preprocess, img_size=(height, width))

    def crop(self, images: Tensor) -> Tensor:
        """Center crop of resized test images: [B, C, H', W'] -> [B, C, H, W]."""
        (H, W), (h, w) = images.shape[-2:], self.encoder.img_size
        top, left = (H - h) // 2, (W - w) // 2
        return images[..., top : top + h, left : left + w]

    def preprocess(self, image: ImageLike | Sequence[ImageLike]) -> Tensor:
        """One or several images, as test images are prepared -> [B, C, H, W] normalized, on the classifier's device.

        Raises:
            UnreadableImage: naming the image that cannot be read.
        """
        return self.crop(self.test_preprocess(image).to(self.head.weight.device))

    def predict(self, image: ImageLike) -> list[tuple[str, float]]:
        """Classes of one image with their probabilities, the most probable first.

        Raises:
            UnreadableImage: if the image cannot be read.
        """
        with torch.inference_mode():
            probability = self(self.preprocess(image)).softmax(1)[0]
        order = probability.argsort(descending=True).tolist()
        return [(self.classes[i], float(probability[i])) for i in order]


def classifier_bytes(model: ImageClassifier) -> bytes:
    """The classifier as a safetensors file, for :func:`load_classifier`."""
    metadata = encoder_metadata(model.encoder) | {"classes": model.classes, "test_crop": model.test_crop}
    return safetensors_bytes(model.state_dict(), {"classifier": metadata})


@own_defaults()
def load_classifier(source: str | Path, device: torch.device | str = "cpu") -> ImageClassifier:
    """Load a fine-tuned classifier in evaluation mode.

    Args:
        source: a run folder in which ``dmjd evaluate finetune`` has finished, or a ``classifier.safetensors``.
        device: device of the weights.

    Returns:
        A module, normalized images [B, C, H, W] -> logits [B, classes], with ``classes``, ``preprocess(images)`` and
        ``predict(image)``.

    Raises:
        ValueError: naming what is wrong with the source.
    """
    path = check_path("source", source)
    file = path / "evaluation" / "finetune" / CLASSIFIER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no {file}: fine-tune first (dmjd evaluate finetune {source} --data ...)")
    if path.is_dir():
        _check_belongs(file, path / "evaluation" / "finetune.json")
    state, metadata = read_safetensors(file)
    if "classifier" not in metadata:
        raise ValueError(f"{file} is not a dmjd classifier; dmjd.load_encoder reads encoders")
    head = check_json(metadata["classifier"], HeadMetadata, str(file))
    prefix = "encoder."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    encoder = build_encoder_of(metadata["classifier"], weights, file)
    if encoder.preprocess is None or not 0 < head["test_crop"] <= 1:
        raise ValueError(f"{file}: its metadata does not describe a classifier")
    model = ImageClassifier(encoder, head["classes"], head["test_crop"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit: {str(error).splitlines()[-1].strip()}") from None
    return model.eval().to(device)


def _check_belongs(file: Path, result: Path) -> None:
    """Check that a classifier is the one of a result: a kill may have come between writing the two.

    Raises:
        ValueError: if it is not, or the result is damaged.
    """
    if result.exists():
        digest = read_json(result, dict[str, Any]).get(CLASSIFIER_KEY)  # version 0.1 did not record it
        if digest is not None and digest != read_digest(file):
            raise ValueError(f"{file} is not the classifier of {result}: repeat dmjd evaluate finetune")
