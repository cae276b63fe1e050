"""Pre-train a ViT on a folder of images, and load it with timm.

python examples/folder_to_timm.py ~/images runs/mine --minutes 30
"""

import argparse
from pathlib import Path

import timm
import torch

import dmjd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder of images; no labels needed")
    parser.add_argument("out", type=Path, help="run folder")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="length, instead of minutes")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--encoder", default="vit_tiny_patch16")
    given = parser.parse_args()

    length = {"minutes": given.minutes} if given.steps is None else {"steps": given.steps}
    config = dmjd.recipes.folder(
        data=given.images, out=given.out, img_size=given.img_size, encoder=given.encoder, **length
    )
    dmjd.pretrain(config)  # resumes an interrupted run

    encoder = dmjd.load_encoder(given.out)
    name, arguments = dmjd.interop.timm_call(encoder)
    file = dmjd.export(given.out, format="timm", out=given.out / "timm.safetensors").path
    model = timm.create_model(name, checkpoint_path=str(file), **arguments).eval()

    images = torch.rand(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        difference = (model.forward_features(images) - encoder.forward_features(images)).abs().max()
    print(f"{name} in timm, largest difference to our encoder {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
