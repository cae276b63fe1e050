"""Fast JPEG decoding gives Pillow's pixels, and leaves other JPEGs to Pillow."""

import io
import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmjd.data.sources.folder import FolderSource
from dmjd.data.train_loader import TrainLoader
from dmjd.data.transforms import crop_resize
from dmjd.images import jpeg
from dmjd.images.reading import open_image, read_image
from dmjd.images.resampling import resize_box
from dmjd.images.stored import UnreadableImage


def natural(height, width, channels=3, seed=0):
    """Smooth colors with some grain, far from black and white."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 196, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(20, 235).astype(np.uint8)[..., :channels]


def encoded(array, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def by_pillow(data):
    array = np.asarray(Image.open(io.BytesIO(data)))
    return array[..., None] if array.ndim == 2 else array


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3]),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    restart=st.sampled_from([0, 3]),
)
def test_pixels_and_size_are_pillows(height, width, channels, subsampling, progressive, restart):
    options = {"progressive": progressive, "subsampling": subsampling, "restart_marker_blocks": restart}
    data = encoded(natural(height, width, channels), **options)
    plain = jpeg.plain_jpeg(data)
    assert (plain.height, plain.width) == (height, width)
    pixels = jpeg.decode(plain)
    assert pixels.shape == (height, width, channels)
    # Both libraries bundle a decoder, and versions may round differently.
    assert np.abs(pixels.astype(int) - by_pillow(data)).max() <= 3


@pytest.mark.parametrize("options", [{}, {"keep_rgb": True, "subsampling": 0}, {"comment": b"\xff\xda\xff\xe1" * 9}])
def test_unusual_but_plain(options):
    data = encoded(natural(20, 30), **options)
    assert np.abs(jpeg.decode(jpeg.plain_jpeg(data)).astype(int) - by_pillow(data)).max() <= 3


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_rotated_images_are_left_to_pillow(orientation):
    data = encoded(natural(16, 24), exif=exif_of(orientation))
    assert jpeg.plain_jpeg(data) is None
    assert open_image(data).size == ((24, 16) if orientation > 4 else (16, 24))


def test_rotation_in_xmp_is_found():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(natural(16, 24))
    segment = b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp
    assert jpeg.plain_jpeg(data[:2] + segment + data[2:]) is None
    assert read_image(data[:2] + segment + data[2:]).shape == (24, 16, 3)


def test_upright_exif_is_plain():
    assert jpeg.plain_jpeg(encoded(natural(16, 24), exif=exif_of(1))) is not None


def test_jpegs_that_are_not_plain():
    cmyk = io.BytesIO()
    Image.fromarray(natural(16, 16)).convert("CMYK").save(cmyk, "JPEG")
    png = io.BytesIO()
    Image.fromarray(natural(16, 16)).save(png, "PNG")
    good = encoded(natural(16, 16))
    frame = good.index(b"\xff\xc0")
    twelve_bits = good[: frame + 4] + b"\x0c" + good[frame + 5 :]
    arithmetic = good.replace(b"\xff\xc0", b"\xff\xc9")
    for data in (cmyk.getvalue(), png.getvalue(), twelve_bits, arithmetic, good[:30], b"\xff\xd8\xff", b""):
        assert jpeg.plain_jpeg(data) is None


def test_bomb_is_refused_before_it_is_unpacked():
    good = encoded(natural(16, 16))
    frame = good.index(b"\xff\xc0")
    bomb = good[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + good[frame + 9 :]
    assert jpeg.plain_jpeg(bomb) is not None
    with pytest.raises(UnreadableImage, match="pixels"):
        open_image(bomb, name="bomb")


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.booleans())
def test_a_file_cut_short_is_unreadable(fraction, progressive):
    data = encoded(natural(60, 80), progressive=progressive)
    with pytest.raises(UnreadableImage):
        read_image(data[: int(fraction * (len(data) - 40))])


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.99), st.binary(min_size=1, max_size=9), st.integers(0, 3))
def test_damaged_data_are_decoded_or_refused_as_by_pillow(fraction, garbage, missing):
    data = bytearray(encoded(natural(60, 80)))
    first = data.index(b"\xff\xda") + 14  # where the pixels begin
    position = first + int(fraction * (len(data) - first))
    data[position : position + len(garbage)] = garbage
    data = bytes(data[: len(data) - missing])
    try:
        expected = by_pillow(data)
    except Exception:
        with pytest.raises(UnreadableImage):
            read_image(data)
    else:
        assert np.abs(read_image(data).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_converted_as_in_every_format(channels, in_chans):
    data = encoded(natural(20, 24, channels))
    png = io.BytesIO()
    pixels = jpeg.decode(jpeg.plain_jpeg(data))
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(png, "PNG")
    assert np.array_equal(read_image(data, in_chans), read_image(png.getvalue(), in_chans))
    assert np.array_equal(read_image(data, in_chans, (0, 51)), read_image(png.getvalue(), in_chans, (0, 51)))


regions = st.tuples(st.integers(30, 400), st.integers(30, 400)).flatmap(
    lambda side: st.tuples(
        st.just(side),
        st.integers(20, side[0]).flatmap(lambda h: st.tuples(st.integers(0, side[0] - h), st.just(h))),
        st.integers(20, side[1]).flatmap(lambda w: st.tuples(st.integers(0, side[1] - w), st.just(w))),
    )
)


@settings(max_examples=60, deadline=None)
@given(regions, st.tuples(st.integers(20, 60), st.integers(20, 60)), st.booleans())
def test_fast_crop_is_pillows(region, size, flip):
    (height, width), (top, box_height), (left, box_width) = region
    data, box = encoded(natural(height, width)), (top, left, box_height, box_width)
    fast = crop_resize(*open_image(data).read_for(box, size), size, flip).numpy()[..., :: -1 if flip else 1]
    if jpeg.reduction(box, size) == 1:  # torch's kernel: like torchvision, it reads no pixel outside of the box
        cut = Image.open(io.BytesIO(data)).crop((left, top, left + box_width, top + box_height))
        slow = np.asarray(cut.resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        difference = np.abs(fast.astype(int) - slow)
        assert difference.max() <= 2
        assert (difference > 1).mean() < 0.02
    else:  # fewer frequencies decoded
        slow = resize_box(read_image(data), box, size).numpy()
        difference = np.abs(fast.astype(int) - slow)
        assert difference.mean() < 1.2
        assert np.quantile(difference, 0.99) <= 6


@pytest.mark.parametrize(
    ("box", "factor"),
    [
        ((0, 0, 448, 448), 1),
        ((0, 0, 895, 999), 1),
        ((0, 0, 896, 999), 2),
        ((5, 5, 1792, 1800), 4),
        ((0, 0, 9e4, 9e4), 8),
    ],
)
def test_reduction_leaves_the_box_twice_as_large_as_the_result(box, factor):
    assert jpeg.reduction(box, (224, 224)) == factor


@pytest.mark.parametrize("side", [(99, 161), (8, 9), (500, 11), (15, 15)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_images_have_the_size_they_should(side, factor):
    for channels in (1, 3):
        reduced = jpeg.decode(jpeg.plain_jpeg(encoded(natural(*side, channels))), factor)
        assert reduced.shape == (-(-side[0] // factor), -(-side[1] // factor), channels)


def test_crops_of_large_images_are_at_the_right_position():
    """Boxes in a reduced image are fractional, and must not be off by half a pixel."""
    data = encoded(natural(640, 800))
    for box in [(1, 3, 401, 333), (239, 467, 401, 333), (0, 0, 640, 800)]:
        exact = resize_box(read_image(data), box, (32, 32)).int()
        pixels, inner = open_image(data).read_for(box, (32, 32))
        assert pixels.shape[0] < 640
        assert (crop_resize(pixels, inner, (32, 32)).int() - exact).abs().float().mean() < 1


@pytest.fixture
def folder(tmp_path):
    """JPEGs and a PNG; three JPEGs are damaged."""
    for i in range(16):
        array = natural(40 + 3 * i, 90 - 2 * i, seed=i)
        options = {"exif": exif_of(6)} if i % 5 == 1 else {}
        (tmp_path / f"{i:02}.jpg").write_bytes(encoded(array, **options))
    Image.fromarray(natural(50, 60)).save(tmp_path / "16.png")
    (tmp_path / "17.jpg").write_bytes(encoded(natural(200, 200))[:900])
    (tmp_path / "18.jpg").write_bytes(b"text")
    (tmp_path / "19.jpg").write_bytes(encoded(natural(600, 600))[:-900])
    return FolderSource(tmp_path)


def test_loader_replaces_what_is_damaged_inside(folder):
    """Such images have a valid header; the damage shows only when their crop is decoded."""
    taken = {}
    for workers in (0, 2):
        loader = TrainLoader(folder, img_size=(24, 20), batch_size=10, num_workers=workers)
        batches = loader.batches()
        taken[workers] = list(itertools.islice(batches, 4))
        batches.close()
    unreadable = [{name.rsplit("/", 1)[1] for b in batches for name, _ in b.unreadable} for batches in taken.values()]
    assert unreadable == [{"17.jpg", "18.jpg", "19.jpg"}] * 2
    for a, b in zip(taken[0], taken[2], strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.keys, b.keys)
        assert (a.images.float().std((1, 2, 3)) > 1).all()
