"""The built-in rendered digits."""

import hashlib
import pickle

import numpy as np

from dmjd.data.sources.digits import DigitsSource, render


def test_counts_labels_and_types():
    for split, count in (("train", 12_000), ("test", 2_000)):
        source = DigitsSource(split)
        assert len(source) == count
        assert source.classes == list("0123456789")
        assert source.labels.dtype == np.int64
        assert np.bincount(source.labels).min() > count / 15
        image = source.read(count - 1)
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8


def test_rendering_is_unchanged():
    """If the images change, the rendering version must change too, or old results would be compared with new ones."""
    digest = hashlib.sha256(render("test")[0].tobytes()).hexdigest()[:16]
    assert (digest, DigitsSource("test").fingerprint()) == ("1fdec7e9d16a22b6", "768006d98931")


def test_digits_are_visible():
    images = render("test")[0].astype(float)
    assert images.std((1, 2)).max(-1).min() > 15  # no image is uniform in all channels


def test_raw_pixels_are_poor_features():
    """20-nearest-neighbor accuracy on raw pixels is far below the 98 % on the originals."""
    (train, y), (test, z) = render("train"), render("test")
    a, b = (x.reshape(len(x), -1).astype(np.float32) / 127.5 - 1 for x in (train, test[:300]))
    similarity = (b @ a.T) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)[:, None])
    nearest = np.argpartition(-similarity, 20, axis=1)[:, :20]
    votes = np.stack([(y[nearest] == c).sum(1) for c in range(10)], axis=1)
    assert 0.2 < (votes.argmax(1) == z[:300]).mean() < 0.6


def test_channel_policy_and_pickling():
    source = pickle.loads(pickle.dumps(DigitsSource("test", in_chans=1)))
    assert source.read(3).shape == (32, 32, 1)
    assert source.fingerprint() == DigitsSource("test").fingerprint()


def test_rendering_is_a_function_of_the_seed():
    images, labels = render("test")
    render.cache_clear()
    again, same = render("test")
    assert (images == again).all()
    assert (labels == same).all()
    assert (render("test", seed=1)[0] != images).any()
