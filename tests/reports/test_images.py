"""Rows of thumbnails of a report."""

import numpy as np
import torch
from image_sets import smooth_images

from dmjd.data.sources.registry import open_source
from dmjd.images.preprocess import Preprocess
from dmjd.reports.images import gallery
from dmjd.reports.sample import Sample


def test_only_thumbnails_of_two_labeled_images_have_a_border(tmp_path):
    classes = ["cat", "", "dog", "", "cat"]
    files = smooth_images(tmp_path, len(classes))
    lines = [f"{file.name},{name}" for file, name in zip(files, classes, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    source = open_source(tmp_path / "list.csv", labels="column", label_column="label")
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    sample = Sample(source, Preprocess((16, 16)), features, torch.arange(5), np.empty((0, 64, 64, 3), np.uint8), [])
    rows = {file.name: row for row, file in enumerate(files)}
    seen = 0
    for query, *neighbors in gallery(sample)[0].neighbors:
        assert query.same is None
        own = classes[rows[query.alt.split()[0]]]
        for one in neighbors:
            other = classes[rows[one.alt.split()[0]]]
            assert one.same == (own == other if own and other else None)
            seen += 1
    assert seen == 20
