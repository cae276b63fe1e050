"""The hash of a set's content: other images or labels of the same sizes are noticed."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dense_sets import make_segmentation_set
from image_sets import save
from PIL import Image

from dmjd.data.sources.registry import open_source
from dmjd.data.sources.segmentation_masks import open_segmentation
from dmjd.data.sources.subset import SubsetSource


def write(path, values, labels):
    """A table of images that all take the same number of bytes."""
    images = [np.full((4, 4, 3), value, np.uint8).tobytes() for value in values]
    table = {"image": [{"bytes": data, "path": None} for data in images], "label": labels}
    pq.write_table(pa.table(table), path, compression="none", use_dictionary=False)


def test_a_table_with_other_images_or_labels(tmp_path):
    hashes = []
    for values, labels in (([1, 2], [0, 1]), ([1, 3], [0, 1]), ([1, 2], [1, 0]), ([1, 2], [0, 1])):
        write(tmp_path / "a.parquet", values, labels)
        source = open_source(tmp_path / "a.parquet", labels="column")
        hashes.append((source.fingerprint(), source.content_hash()))
    assert len({fingerprint for fingerprint, _ in hashes}) == 1
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3


def test_a_folder_with_another_image_of_the_same_size(tmp_path):
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (6, 5), (i, 0, 0)).save(tmp_path / "a" / f"{i}.bmp")
    before = open_source(tmp_path / "a")
    first = before.content_hash(), SubsetSource(before, [0, 1]).content_hash()
    Image.new("RGB", (6, 5), (9, 0, 0)).save(tmp_path / "a" / "2.bmp")
    after = open_source(tmp_path / "a")
    assert after.fingerprint() == before.fingerprint()
    assert after.content_hash() != first[0]
    assert SubsetSource(after, [0, 1]).content_hash() == first[1]


def test_files_that_cannot_be_read_are_left_out(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to("nowhere")
    assert open_source(tmp_path / "a").content_hash() == open_source(tmp_path / "a").content_hash()


def test_masks_count(tmp_path):
    root = make_segmentation_set(tmp_path / "set", {"train": 2})
    before = open_segmentation(root, "train").content_hash()
    file = root / "train" / "masks" / "00.png"
    Image.fromarray(2 - np.minimum(np.array(Image.open(file)), 2)).save(file)
    assert open_segmentation(root, "train").content_hash() != before
