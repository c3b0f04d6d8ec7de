"""The two decoders of the paper: patch features ``(B, N, D)`` -> class scores ``(B, N, K)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import kernels
from .config import SegmenterConfig
from .vit import Block, drop_path_rates


class LinearDecoder(nn.Module):
    """One linear layer (paper, section 3.2, "Linear")."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(patches)


class MaskTransformer(nn.Module):
    """Class embeddings attend with the patches; masks are their scalar products (paper, section 3.2)."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        dim, classes = config.embed_dim, config.num_classes
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.decoder_num_heads,
                int(config.mlp_ratio * dim),
                config.decoder_norm_eps,
                config.decoder_dropout,
                rate,
            )
            for rate in drop_path_rates(config.decoder_drop_path_rate, config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, config.decoder_norm_eps)
        self.proj_patch = nn.Parameter(torch.zeros(dim, dim))
        self.proj_classes = nn.Parameter(torch.zeros(dim, dim))
        self.mask_norm = nn.LayerNorm(classes, config.decoder_norm_eps)

    def tokens(self, patches: Tensor) -> Tensor:
        """``(B, N, D)`` patch features -> ``(B, N + K, D)``: projected patches, then class embeddings."""
        return torch.cat([self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)], 1)

    def forward(self, patches: Tensor) -> Tensor:
        classes = self.cls_emb.shape[1]
        x = self.tokens(patches)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        norm = self.mask_norm
        return kernels.mask_scores(
            x[:, :-classes] @ self.proj_patch, x[:, -classes:] @ self.proj_classes, norm.weight, norm.bias, norm.eps
        )
