"""The models that ours is compared with, all with the same random weights.

The reference is the official arithmetic: eager, float32, attention matrix and full-size logits materialised. The peer
is the same model with PyTorch's own means: scaled_dot_product_attention, low-precision weights, torch.compile.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from segmenter_fast import Segmenter, SegmenterConfig, create_model
from segmenter_fast.config import variant_config
from segmenter_fast.describe import count_macs
from segmenter_fast.io.images import ImageSource, normalise, read_image
from segmenter_fast.reference import Attention, ReferenceSegmenter, Rotation
from segmenter_fast.token_merging import Merge

from ..device import name_of

PHOTOGRAPH = str(files("segmenter_fast") / "assets" / "coffee.jpg")


@dataclass(frozen=True)
class ModelCase:
    """A model and its input: ``batch`` views of a photograph, ``size`` pixels a side.

    ``compile`` applies to peers and ours. ``merge`` are schedules of token merging that ours is measured with, too.
    """

    variant: str
    dtype: torch.dtype
    size: int = 512
    batch: int = 1
    classes: int = 150
    compile: bool = True
    merge: tuple[str, ...] = ()

    @cached_property
    def config(self) -> SegmenterConfig:
        return variant_config(self.variant).replace(num_classes=self.classes, image_size=self.size)

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "patch": self.config.patch_size,
            "tokens": (-(-self.size // self.config.patch_size)) ** 2 + self.config.num_prefix_tokens,
            "classes": self.classes,
            "size": self.size,
            "batch": self.batch,
            "dtype": name_of(self.dtype),
            "compiled": self.compile,
        }

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products of one call, counted on the reference."""
        return self.flops_with(None)

    def flops_with(self, merge: Merge) -> int:
        """FLOPs of one call of ours with token merging; 0 where they depend on the image."""
        config = self.config.replace(merging=merge)
        return 0 if config.adaptive else 2 * self.batch * count_macs(config, self.size)

    @property
    def needs_bytes(self) -> int:
        """Lower bound of the reference's memory: scores and probabilities of one layer, or its logits."""
        tokens = self.parameters["tokens"]
        return 4 * self.batch * max(2 * self.config.num_heads * tokens**2, self.classes * self.size**2)


def in_words(parameters: dict[str, Any]) -> str:
    """ "512 px, batch 1, 150 classes, float32", as far as these parameters are there."""
    texts = {"size": "{} px", "batch": "batch {}", "classes": "{} classes", "dtype": "{}"}
    words = [text.format(parameters[key]) for key, text in texts.items() if key in parameters]
    return ", ".join(words if parameters.get("compiled", True) else [*words, "not compiled"])


def build(
    case: ModelCase, device: torch.device, image: ImageSource = PHOTOGRAPH
) -> tuple[Segmenter, ReferenceSegmenter, Tensor]:
    """Ours and the reference with the same random weights, and ``(B, 3, S, S)`` normalised views of ``image``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(case.variant, num_classes=case.classes, image_size=case.size)
    model = model.to(device).eval()
    reference = ReferenceSegmenter(model.config).to(device).eval()
    reference.load_state_dict(model.state_dict())
    view = normalise(centre(image, case.size), model.config.mean, model.config.std, device)
    step = max(1, case.size // case.batch)
    return model, reference, torch.cat([view.roll(i * step, -1) for i in range(case.batch)])


def centre(image: ImageSource, size: int) -> np.ndarray:
    """``(S, S, 3)`` uint8: the largest square in the middle of ``image``, resized."""
    return np.asarray(ImageOps.fit(Image.fromarray(read_image(image)), (size, size)))


class SdpaAttention(Attention):
    """The reference's attention through ``scaled_dot_product_attention``, by ``backend`` or PyTorch's own choice."""

    backend: SDPBackend | None = None

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        with contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, dim))


def with_sdpa(
    reference: ReferenceSegmenter, dtype: torch.dtype, backend: SDPBackend | None = None
) -> ReferenceSegmenter:
    """The peer before it is compiled: a copy of the reference in ``dtype`` with SDPA's attention."""
    peer = copy.deepcopy(reference).to(dtype)
    for module in peer.modules():
        if isinstance(module, Attention):
            module.__class__ = SdpaAttention
            assert isinstance(module, SdpaAttention)
            module.backend = backend
    return peer
