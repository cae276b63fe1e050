"""Labels of the images in shards."""

import pytest
from archives import tar
from image_sets import png

from dmjd.data.sources.registry import open_source


def test_labels_are_folders_or_members(tmp_path):
    names = ("./set/cat/1", "./set/cat/2", "./set/dog/x/3")
    file = tar(tmp_path / "a.tar", {f"{name}.png": png(0) for name in names})
    source = open_source(file, labels="folder")
    assert (source.labels.tolist(), source.classes) == ([0, 0, 1], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"3 of 3 images of .* have no label, .*a\.tar/set/cat/1\.png for one"):
        open_source(file, labels="column")
    tar(file, {"cat/1.png": png(0), "2.png": png(1)})
    with pytest.raises(ValueError, match=r"1 of 2 images of .* lie in no class folder, 2\.png for one"):
        open_source(file, labels="folder")
    # .cls wins over .json and .txt, wherever they stand
    tar(file, {"1.txt": b"x", "1.cls": b"dog\n", "1.json": b"{}", "1.png": png(0), "2.PNG": png(1), "2.txt": b" cat "})
    source = open_source(file, labels="column")
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["cat", "dog"])
    numbers = {f"{i}.{e}": c for i, n in enumerate((10, 9)) for e, c in (("png", png(0)), ("cls", str(n).encode()))}
    assert open_source(tar(file, numbers), labels="column").classes == ["9", "10"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.cls", b"", "is no class"),
        ("0.cls", b"-1", "'?-1'? is no class"),
        ("0.cls", b"\xff", "it is no UTF-8 text"),
        ("0.txt", b"a cat\non a mat", "is no class"),
        ("0.json", b"{", "it is no JSON"),
        ("0.json", b'{"caption": 1}', "it has no field label or cls"),
        ("0.json", b'{"cls": [1]}', r"\[1\] is no class"),
        ("0.json", b"[" * 100_000, "it is no JSON"),
    ],
)
def test_a_label_that_is_no_class_is_named(tmp_path, name, content, message):
    file = tar(tmp_path / "a.tar", {"0.png": png(0), name: content})
    with pytest.raises(ValueError, match=rf"the {name[1:]} label of .*a\.tar/0\.png: .*{message}"):
        open_source(file, labels="column")
