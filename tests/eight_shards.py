"""Eight tars of four images, for servers."""

import io
import tarfile

import numpy as np
from PIL import Image

NUM_SHARDS, IMAGES = 8, 4  # shards, and images of each


def shard(number: int, seed: int = 0) -> bytes:
    """A tar of four images, whose first values count on."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(IMAGES):
            value = number * IMAGES + i
            noise = np.random.default_rng(value + 1000 * seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            noise[0, 0] = value
            image = io.BytesIO()
            Image.fromarray(noise).save(image, "png")
            for name, content in ((f"{value:03}.png", image.getvalue()), (f"{value:03}.cls", b"%d" % (value % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


SHARDS = {f"/set/{number}.tar": shard(number) for number in range(NUM_SHARDS)}
SIZE = max(map(len, SHARDS.values()))


def in_gb(shards: float) -> float:
    """The size of so many shards."""
    return shards * SIZE / 1e9
