"""Classifier files: round trip, prediction, errors."""

import json

import numpy as np
import pytest
import torch
from support import small_encoder

from dmjd.encoders.classifier import ImageClassifier, classifier_bytes, load_classifier
from dmjd.encoders.stored import encoder_bytes, encoder_metadata
from dmjd.files import digest_of, write_safetensors
from dmjd.images.preprocess import Preprocess


@pytest.fixture
def classifier():
    encoder = small_encoder("vit_tiny_patch8", img_size=(16, 24))
    encoder.preprocess = Preprocess((16, 24))
    model = ImageClassifier(encoder, ["cat", "dog", "owl"], test_crop=0.5)
    model.init_head(3)
    return model.eval()


def test_file_round_trip(classifier, tmp_path):
    file = tmp_path / "classifier.safetensors"
    file.write_bytes(classifier_bytes(classifier))
    loaded = load_classifier(file)
    assert classifier_bytes(loaded) == file.read_bytes()
    assert (loaded.classes, loaded.test_crop, loaded.training) == (["cat", "dog", "owl"], 0.5, False)
    assert loaded.encoder.preprocess == classifier.encoder.preprocess
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(images), classifier(images))


def test_predictions_use_the_center_crop(classifier):
    torch.nn.init.normal_(classifier.head.weight)
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    predictions = classifier.predict(image)
    assert classifier.test_preprocess.img_size == (32, 48)
    assert sorted(name for name, _ in predictions) == ["cat", "dog", "owl"]
    probabilities = [probability for _, probability in predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    border = image.copy()
    border[:8], border[-8:] = 0, 255
    assert classifier.predict(border) == predictions
    with torch.no_grad():
        center = classifier(classifier.encoder.preprocess(image[8:24, 12:36])).softmax(1)[0]
    torch.testing.assert_close(torch.tensor(dict(predictions)["cat"]), center[0])


def test_preprocessed_images_are_those_of_predictions():
    encoder = small_encoder("vit_tiny_patch8", img_size=(96, 96))
    encoder.preprocess = Preprocess((96, 96))
    model = ImageClassifier(encoder, ["cat", "dog", "owl"], test_crop=0.875).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    image = np.random.default_rng(0).integers(0, 256, (130, 210, 3), dtype=np.uint8)
    images = model.preprocess(image)
    assert torch.equal(images, model.crop(model.test_preprocess(image)))
    assert not torch.allclose(images, encoder.preprocess(image))
    with torch.no_grad():
        probability = model(images).softmax(1)[0]
        assert dict(model.predict(image)) == dict(zip(model.classes, probability.tolist(), strict=True))
        assert model.preprocess([image, image[:, ::-1]]).shape == (2, 3, 96, 96)


def test_the_head_depends_on_the_seed_only(classifier):
    before = classifier.head.weight.clone()
    torch.manual_seed(9)
    classifier.init_head(3)
    assert torch.equal(classifier.head.weight, before)
    assert not classifier.head.bias.any()


def test_errors(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*classifier\.safetensors: fine-tune first"):
        load_classifier(tmp_path)
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(encoder_bytes(classifier.encoder))
    with pytest.raises(ValueError, match=r"encoder\.safetensors is not a dmjd classifier; dmjd\.load_encoder reads"):
        load_classifier(file)
    file.write_bytes(classifier_bytes(classifier)[:1000])
    with pytest.raises(ValueError, match=r"not a readable safetensors file .* cut short"):
        load_classifier(file)


def test_a_classifier_that_is_not_of_the_result_is_refused(classifier, tmp_path):
    """A kill came between writing the two."""
    folder = tmp_path / "evaluation" / "finetune"
    folder.mkdir(parents=True)
    file, result = folder / "classifier.safetensors", tmp_path / "evaluation" / "finetune.json"
    file.write_bytes(classifier_bytes(classifier))
    for content in ({"classifier": digest_of(file.read_bytes())}, {"task": "finetune"}):  # version 0.1 had no digest
        result.write_text(json.dumps(content))
        assert load_classifier(tmp_path).classes == classifier.classes
    result.write_text(json.dumps({"classifier": "0" * 64}))
    with pytest.raises(ValueError, match=r"is not the classifier of .*finetune\.json: repeat dmjd evaluate finetune"):
        load_classifier(tmp_path)
    assert load_classifier(file).classes == classifier.classes


@pytest.mark.parametrize(
    "change", [{"classes": "abc"}, {"classes": ["a"]}, {"test_crop": 0}, {"preprocess": None}, {"options": []}]
)
def test_metadata_of_other_types_is_refused(classifier, tmp_path, change):
    metadata = {"classes": classifier.classes, "test_crop": 0.5} | encoder_metadata(classifier.encoder)
    file = tmp_path / "a.safetensors"
    for content in (metadata | change, 3, None):
        write_safetensors(file, classifier.state_dict(), {"classifier": content})
        with pytest.raises(ValueError, match=str(file)):
            load_classifier(file)
