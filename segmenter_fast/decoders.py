"""The two decoders of the paper, patch features ``(B, N, D)`` -> class scores ``(B, N, K)``; the logits' size.

Features may be those of groups of patches, with the bias ``(B, N)`` of attention to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import Pair, SegmenterConfig
from .vit import make_blocks


def upsampled_size(config: SegmenterConfig, size: Sequence[int]) -> Pair:
    """(height, width) in pixels that the masks of an image of ``size`` are upsampled to, before the crop to it."""
    patch = config.patch_size if config.upsample_to == "padded" else 1
    return -(-size[0] // patch) * patch, -(-size[1] // patch) * patch


def upsampled(
    result: str, masks: Tensor, config: SegmenterConfig, size: Sequence[int], index: Tensor | None = None
) -> Tensor:
    """Return "labels", "probabilities" or "logits" of images of ``size`` (height, width) by their ``Scores.maps``.

    Only "logits", which has no index, builds the full-size scores.
    """
    whole, crop = upsampled_size(config, size), (size[0], size[1])
    if result == "logits":
        return kernels.reference.upsample(masks, whole, crop, align_corners=False)
    op = kernels.upsample_argmax if result == "labels" else kernels.upsample_softmax
    return op(masks, whole, crop, index=index)


class LinearDecoder(nn.Module):
    """One linear layer (paper, section 3.2, "Linear")."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, patches: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.head(patches)


class MaskTransformer(nn.Module):
    """Patches and class embeddings attend to each other; masks are their scalar products (paper, section 3.2)."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        dim, classes = config.embed_dim, config.num_classes
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, dim))
        self.blocks = make_blocks(config, decoder=True)
        self.decoder_norm = nn.LayerNorm(dim, config.decoder_norm_eps)
        self.proj_patch = nn.Parameter(torch.zeros(dim, dim))
        self.proj_classes = nn.Parameter(torch.zeros(dim, dim))
        self.mask_norm = nn.LayerNorm(classes, config.decoder_norm_eps)

    def projected(self, patches: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(B, N, D)`` patch features -> projected patches ``(B, N, D)`` and class embeddings ``(B, K, D)``."""
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)], 1)
        classes = self.cls_emb.shape[1]
        bias = None if bias is None else F.pad(bias, (0, classes))
        for block in self.blocks:
            x = block(x, bias=bias)
        x = self.decoder_norm(x)
        return x[:, :-classes] @ self.proj_patch, x[:, -classes:] @ self.proj_classes

    def forward(self, patches: Tensor, bias: Tensor | None = None) -> Tensor:
        norm = self.mask_norm
        return kernels.mask_scores(*self.projected(patches, bias), norm.weight, norm.bias, norm.eps)
