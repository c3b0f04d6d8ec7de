"""A small model with the attribute names, state-dict keys and forward contracts of mmsegmentation's Segmenter on mmcv.

It stands in for the library in tests of ``accelerate``. The weights of the library's golden load into it.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .official_lookalike import DropPath


class MmModule(nn.Module, metaclass=ABCMeta):
    """A base with a metaclass and a dictionary attribute, as mmengine's ``BaseModule``."""

    def __init__(self, init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg or {"type": "Normal"}


def renamed_argument(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Accept ``residual`` for ``identity``, in a wrapper of the forward as in mmcv."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if "residual" in kwargs:
            kwargs["identity"] = kwargs.pop("residual")
        return forward(self, *args, **kwargs)

    return call


class MmMultiheadAttention(MmModule):
    def __init__(
        self, embed_dims: int, num_heads: int, attn_drop: float, proj_drop: float, drop_path: float, batch_first: bool
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = DropPath(drop_path) if drop_path else nn.Identity()

    @renamed_argument
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        if key_pos is None and query_pos is not None and query_pos.shape == key.shape:
            key_pos = query_pos
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        if self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        out = self.attn(query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
        if self.batch_first:
            out = out.transpose(0, 1)
        return identity + self.dropout_layer(self.proj_drop(out))


class MmFFN(MmModule):
    def __init__(self, embed_dims: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(embed_dims, hidden), nn.GELU(), nn.Dropout(0.0)),
            nn.Linear(hidden, embed_dims),
            nn.Dropout(0.0),
        )
        self.dropout_layer = nn.Identity()

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        return (x if identity is None else identity) + self.dropout_layer(self.layers(x))


class MmTransformerEncoderLayer(MmModule):
    def __init__(
        self, embed_dims: int, num_heads: int, eps: float, attn_drop: float, drop_path: float, batch_first: bool
    ) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(embed_dims, eps)
        self.attn = MmMultiheadAttention(embed_dims, num_heads, attn_drop, 0.0, drop_path, batch_first)
        self.ln2 = nn.LayerNorm(embed_dims, eps)
        self.ffn = MmFFN(embed_dims, 4 * embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.ln1(x), identity=x)
        return self.ffn(self.ln2(x), identity=x)


class MmPatchEmbed(MmModule):
    def __init__(self, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, embed_dims, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.projection(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class MmVisionTransformer(MmModule):
    def __init__(self, embed_dims: int, num_heads: int, layers: int, side: int, **layer: Any) -> None:
        super().__init__()
        self.grid = side // 16
        self.patch_embed = MmPatchEmbed(embed_dims, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid**2 + 1, embed_dims))
        self.layers = nn.ModuleList(
            MmTransformerEncoderLayer(embed_dims, num_heads, 1e-6, **layer) for _ in range(layers)
        )
        self.ln1 = nn.LayerNorm(embed_dims, 1e-6)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        x, size = self.patch_embed(inputs)
        positions = self.pos_embed
        if size != (self.grid, self.grid):
            patches = positions[:, 1:].mT.unflatten(2, (self.grid, self.grid))
            patches = F.interpolate(patches, size, mode="bicubic").flatten(2).mT
            positions = torch.cat([positions[:, :1], patches], 1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions
        for layer in self.layers:
            x = layer(x)
        return (self.ln1(x)[:, 1:].mT.unflatten(2, size),)


class MmSegmenterHead(MmModule):
    def __init__(self, num_classes: int, embed_dims: int, num_heads: int, layers: int, **layer: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dec_proj = nn.Linear(embed_dims, embed_dims)
        self.cls_emb = nn.Parameter(torch.randn(1, num_classes, embed_dims))
        self.layers = nn.ModuleList(
            MmTransformerEncoderLayer(embed_dims, num_heads, 1e-5, **layer) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(embed_dims)
        self.patch_proj = nn.Linear(embed_dims, embed_dims, bias=False)
        self.classes_proj = nn.Linear(embed_dims, embed_dims, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        size = inputs[-1].shape[2:]
        x = torch.cat([self.dec_proj(inputs[-1].flatten(2).mT), self.cls_emb.expand(len(inputs[-1]), -1, -1)], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.decoder_norm(x)
        patches = F.normalize(self.patch_proj(x[:, : -self.num_classes]), dim=2)
        classes = F.normalize(self.classes_proj(x[:, -self.num_classes :]), dim=2)
        return self.mask_norm(patches @ classes.mT).mT.unflatten(2, size).contiguous()


class MmEncoderDecoder(MmModule):
    """Two backbone layers and one head layer with heads of 64, as the golden of mmsegmentation."""

    def __init__(
        self, classes: int = 7, attn_drop: float = 0.0, drop_path: float = 0.0, batch_first: bool = True
    ) -> None:
        super().__init__()
        layer = {"attn_drop": attn_drop, "drop_path": drop_path, "batch_first": batch_first}
        self.backbone = MmVisionTransformer(128, 2, 2, 64, **layer)
        self.decode_head = MmSegmenterHead(classes, 128, 2, 1, **layer)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.interpolate(self.decode_head(self.backbone(inputs)), inputs.shape[2:], mode="bilinear")
