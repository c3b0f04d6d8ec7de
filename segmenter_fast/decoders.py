"""The two decoders of the paper, patch features ``(B, N, D)`` -> class scores ``(B, N, K)``; the logits' size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import kernels
from .config import Pair, SegmenterConfig
from .vit import make_blocks


def upsampled_size(config: SegmenterConfig, size: Sequence[int]) -> Pair:
    """(height, width) in pixels that the masks of an image of ``size`` are upsampled to, before the crop to it."""
    patch = config.patch_size if config.upsample_to == "padded" else 1
    return -(-size[0] // patch) * patch, -(-size[1] // patch) * patch


class LinearDecoder(nn.Module):
    """One linear layer (paper, section 3.2, "Linear")."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, patches: Tensor) -> Tensor:
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

    def projected(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, N, D)`` patch features -> projected patches ``(B, N, D)`` and class embeddings ``(B, K, D)``."""
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x, classes = self.decoder_norm(x), self.cls_emb.shape[1]
        return x[:, :-classes] @ self.proj_patch, x[:, -classes:] @ self.proj_classes

    def forward(self, patches: Tensor) -> Tensor:
        norm = self.mask_norm
        return kernels.mask_scores(*self.projected(patches), norm.weight, norm.bias, norm.eps)
