"""Photographs above their segmentation, without labels: python examples/classes_without_labels.py PHOTO... --out a.png

The encoder is DINOv2's ViT-S/14. The classes are clusters of its patch features by cosine. A linear decoder without a
bias, whose weights are their centres, finds the cluster of a patch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.io.images import normalise, read_image

WEIGHTS = "vit_small_patch14_dinov2.lvd142m"
SIDE = 518


def centres_of(features: Tensor, classes: int, seeds: int = 8, rounds: int = 30) -> Tensor:
    """Find ``(K, D)`` unit centres of ``(N, D)`` features by spherical k-means: the best of some random starts."""
    features = torch.nn.functional.normalize(features, dim=1)
    best = (-1.0, features[:classes])
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        centres = features[torch.randint(len(features), (1,), generator=generator)]
        while len(centres) < classes:  # far from the others with a higher probability, as in k-means++
            distances = 1 - (features @ centres.mT).amax(1).clamp(max=1)
            centres = torch.cat([centres, features[torch.multinomial(distances, 1, generator=generator)]])
        for _ in range(rounds):
            nearest = (features @ centres.mT).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, features)
            centres = torch.nn.functional.normalize(torch.where(sums.any(1, keepdim=True), sums, centres), dim=1)
        score = (features @ centres.mT).amax(1).mean().item()
        best = max(best, (score, centres), key=lambda found: found[0])
    return best[1]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("classes.png"))
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument("--pretrained", default=WEIGHTS, help="a name of timm's, or a file")
    given = parser.parse_args()

    backbone = {"pretrained": given.pretrained, "num_register_tokens": 0, "pos_embed_prefix": True}
    model = sf.create_model("seg_s_dinov2_linear_14", num_classes=given.classes, image_size=SIDE, **backbone).eval()
    photos = [ImageOps.fit(Image.fromarray(read_image(path)), (SIDE, SIDE)) for path in given.photos]
    mean, std = model.config.mean, model.config.std
    features = [model.encoder(normalise(read_image(photo), mean, std, torch.device("cpu")))[0] for photo in photos]
    decoder = model.decoder.state_dict()  # its tensors are the model's own
    decoder["head.weight"].copy_(centres_of(torch.cat(features), given.classes))
    decoder["head.bias"].zero_()

    picture = Image.new("RGB", (SIDE * len(photos), 2 * SIDE))
    for column, photo in enumerate(photos):
        picture.paste(photo, (column * SIDE, 0))
        picture.paste(sf.predict(model, photo).overlay(0.6), (column * SIDE, SIDE))
    picture.save(given.out)


if __name__ == "__main__":
    main()
