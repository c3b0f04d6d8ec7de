"""A small model with the attribute names, state-dict keys and forward contracts of the official Segmenter program.

It stands in for the program in tests of ``accelerate``. The weights of the program's golden load into it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = torch.bernoulli(torch.full((len(x), 1, 1), 1 - self.drop_prob, dtype=x.dtype, device=x.device))
        return x * keep / (1 - self.drop_prob)


class OfficialMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class OfficialAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.attn = None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attn = q @ k.mT * self.scale
        if mask is not None:
            attn = attn.masked_fill(mask == 0, float("-inf"))
        attn = self.attn_drop(attn.softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2))), attn


class OfficialBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = OfficialAttention(dim, heads, dropout)
        self.mlp = OfficialMlp(dim, hidden, dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Tensor:
        y, attn = self.attn(self.norm1(x), mask)
        if return_attention:
            return attn
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OfficialPatchEmbedding(nn.Module):
    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, im: Tensor) -> Tensor:
        return self.proj(im).flatten(2).transpose(1, 2)


class OfficialEncoder(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, patch_size: int, side: int, drop_path: float) -> None:
        super().__init__()
        self.patch_embed = OfficialPatchEmbedding(patch_size, dim)
        self.patch_size = patch_size
        self.grid = side // patch_size
        self.distilled = False
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid**2 + 1, dim))
        rates = torch.linspace(0, drop_path, layers).tolist()
        self.blocks = nn.ModuleList(OfficialBlock(dim, heads, 4 * dim, 0.0, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def tokens(self, im: Tensor) -> Tensor:
        positions, (height, width) = self.pos_embed, (side // self.patch_size for side in im.shape[2:])
        if height * width != self.grid**2:
            patches = positions[:, 1:].mT.unflatten(2, (self.grid, self.grid))
            patches = F.interpolate(patches, (height, width), mode="bilinear").flatten(2).mT
            positions = torch.cat([positions[:, :1], patches], 1)
        return torch.cat([self.cls_token.expand(len(im), -1, -1), self.patch_embed(im)], 1) + positions

    def forward(self, im: Tensor, return_features: bool = False) -> Tensor:
        x = self.tokens(im)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x if return_features else self.head(x[:, 0])

    def get_attention_map(self, im: Tensor, layer_id: int) -> Tensor:
        x = self.tokens(im)
        for block in self.blocks[:layer_id]:
            x = block(x)
        return self.blocks[layer_id](x, return_attention=True)


class OfficialMaskTransformer(nn.Module):
    def __init__(self, n_cls: int, dim: int, heads: int, layers: int, patch_size: int, dropout: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.n_cls = n_cls
        self.scale = dim**-0.5
        self.blocks = nn.ModuleList(OfficialBlock(dim, heads, 4 * dim, dropout, 0.0) for _ in range(layers))
        self.cls_emb = nn.Parameter(torch.randn(1, n_cls, dim))
        self.proj_dec = nn.Linear(dim, dim)
        self.proj_patch = nn.Parameter(self.scale * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(self.scale * torch.randn(dim, dim))
        self.decoder_norm = nn.LayerNorm(dim)
        self.mask_norm = nn.LayerNorm(n_cls)

    def forward(self, x: Tensor, im_size: tuple[int, int]) -> Tensor:
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.n_cls] @ self.proj_patch, x[:, -self.n_cls :] @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        masks = self.mask_norm(patches @ classes.mT)
        return masks.unflatten(1, (im_size[0] // self.patch_size, -1)).permute(0, 3, 1, 2)


class OfficialSegmenter(nn.Module):
    """Two encoder layers and one decoder layer with heads of 64, as the golden of the official program."""

    def __init__(self, n_cls: int = 7, dim: int = 128, drop_path: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        self.n_cls = n_cls
        self.patch_size = 16
        self.encoder = OfficialEncoder(dim, dim // 64, 2, 16, 64, drop_path)
        self.decoder = OfficialMaskTransformer(n_cls, dim, dim // 64, 1, 16, dropout)

    def forward(self, im: Tensor) -> Tensor:
        height, width = im.shape[2:]
        im = F.pad(im, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.encoder(im, return_features=True)
        masks = self.decoder(x[:, 1:], im.shape[2:])
        return F.interpolate(masks, im.shape[2:], mode="bilinear")[..., :height, :width]
