"""Images in order for evaluation."""

import pytest
from image_sets import save

from dmjd.data.eval_loader import EvalLoader, read_all
from dmjd.data.sources.folder import FolderSource
from dmjd.images.preprocess import Preprocess


def labeled_folder(tmp_path):
    for i in range(7):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", 10 * i, size=(9 + i, 12))
    (tmp_path / "a" / "2.png").write_text("words")
    return FolderSource(tmp_path, with_labels=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_labels_and_unreadable_images(tmp_path, workers):
    source = labeled_folder(tmp_path)
    loader = EvalLoader(source, Preprocess((8, 8)), batch_size=3, num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(b.index) for b in batches] == [2, 3, 1]
        index = [i for b in batches for i in b.index.tolist()]
        assert index == [0, 2, 3, 4, 5, 6]
        assert [int(p[0, 4, 4]) for b in batches for p in b.raw] == [0, 40, 60, 10, 30, 50]
        assert [x for b in batches for x in b.labels.tolist()] == source.labels[index].tolist()
        assert [name.endswith("2.png") for name, _ in loader.unreadable] == [True]


def test_read_all_of_some(tmp_path):
    images = read_all(labeled_folder(tmp_path), Preprocess((8, 8)), indices=[6, 1, 0])
    assert images.index.tolist() == [6, 0]
    assert images.raw.shape == (2, 3, 8, 8)
    assert images.labels.tolist() == [1, 0]
    assert len(images.unreadable) == 1


def test_nothing_readable(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of .* can be read; .*1\.png: the file is empty"):
        read_all(FolderSource(tmp_path), Preprocess((8, 8)))
