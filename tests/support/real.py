"""Real weights and photographs, where they lie beside the project: DINOv2 ViT-S/14 and four sample photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.benchmarks.models.merging import CLASSES, SIDE, centres_of
from segmenter_fast.io.images import normalise, read_image

FOLDER = Path(__file__).parents[3] / "shared" / "real"
WEIGHTS = FOLDER / "dinov2_small_hf_names.safetensors"
PHOTOGRAPHS = [FOLDER / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]

needs_real_weights = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"needs real weights and photographs: {WEIGHTS.name} in ../shared/real"
)


def real_model() -> sf.Segmenter:
    """A model whose classes are 21 k-means centres of the photographs' patch features, by cosine."""
    model = sf.create_model("seg_s_dinov2_linear_14", pretrained=WEIGHTS, num_classes=CLASSES).eval()
    with torch.no_grad():
        features = torch.cat([model.encoder(crop(model, path))[0] for path in PHOTOGRAPHS])
        centres = centres_of(F.normalize(features, dim=1))
        model.decoder.head.weight.copy_(centres)
        model.decoder.head.bias.zero_()
    return model


def crop(model: sf.Segmenter, path: Path) -> Tensor:
    """The centre of a photograph, its smaller side resized to 518 pixels: ``(1, 3, 518, 518)``, normalised."""
    image = Image.fromarray(read_image(path))
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(side * scale)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    return normalise(np.asarray(image), model.config.mean, model.config.std, torch.device("cpu"))
