"""Segmenter in one plain PyTorch file: the oracle for the fast model.

Attention is written out, nothing is fused, every tensor has the dtype of the input (float64 included), and only the
configuration is shared with the fast model. State-dict keys are those of the official program.

Source: Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021, and its official program. If the
two differ, the program decides: the paper's text applies softmax and LayerNorm over classes after the upsampling, the
program applies the LayerNorm to the patch-level masks and the softmax last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SegmenterConfig


class Rotation:
    """Rotary embedding (DINOv3): channels i and i + d/2 of a patch's head turn by 2 pi coordinate / period."""

    def __init__(self, config: SegmenterConfig, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.prefix, quarter = config.num_prefix_tokens, config.embed_dim // config.num_heads // 4
        angles = torch.zeros(rows * columns, 2 * quarter, dtype=torch.float64)
        for pair in range(2 * quarter):
            turn = 2 * math.pi / config.rope_temperature ** (pair % quarter / quarter)
            patches = torch.arange(rows * columns).double()
            index, count = (patches // columns, rows) if pair < quarter else (patches % columns, columns)
            angles[:, pair] = turn * ((2 * index + 1) / count - 1)
        self.turns = torch.polar(torch.ones_like(angles), angles)  # complex (h w, d/2)
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        patches = x[:, :, self.prefix :].double()
        turned = torch.complex(*patches.chunk(2, -1)) * self.turns.to(x.device)
        return torch.cat([x[:, :, : self.prefix], torch.cat([turned.real, turned.imag], -1).to(self.dtype)], 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        probabilities = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)  # (B, heads, N, N)
        return self.proj((probabilities @ v).transpose(1, 2).reshape(b, n, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc1_g(x)
        return self.fc2(gate * torch.sigmoid(gate) * self.fc1_x(x))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, config: SegmenterConfig, part: str) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, int(config.mlp_ratio * config.embed_dim)
        heads, eps, layer_scale, qkv_bias, mlp = config.decoder_num_heads, config.decoder_norm_eps, False, True, "gelu"
        if part == "encoder":
            heads, eps, layer_scale = config.num_heads, config.encoder_norm_eps, config.layer_scale
            qkv_bias, mlp = config.qkv_bias, config.mlp
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, hidden) if mlp == "gelu" else SwiGlu(dim, math.ceil(hidden / 8) * 8)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, h w, D)


class VisionTransformer(nn.Module):
    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        dim, rows, columns = config.embed_dim, *config.grid
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.distillation_token:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.num_register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        prefix = config.num_prefix_tokens if config.pos_embed_prefix else 0
        if config.pos_embed_kind == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, prefix + rows * columns, dim))
        self.blocks = nn.ModuleList(Block(config, "encoder") for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, config.encoder_norm_eps)
        if config.head_classes:  # unused, but official checkpoints have them
            self.head = nn.Linear(dim, config.head_classes)
            if config.distillation_token:
                self.head_dist = nn.Linear(dim, config.head_classes)

    def positions(self, rows: int, columns: int) -> Tensor:
        grid, mode = self.config.grid, self.config.pos_embed_mode
        if (rows, columns) == grid:
            return self.pos_embed
        if rows * columns == grid[0] * grid[1] and mode in ("bilinear", "bicubic"):
            return self.pos_embed  # only the aspect ratio differs: unchanged, as in the official program
        prefix = self.pos_embed.shape[1] - grid[0] * grid[1]
        patches = self.pos_embed[:, prefix:].transpose(1, 2).unflatten(2, grid)
        extent: dict[str, Any] = {"size": (rows, columns)}
        if mode == "bicubic_offset":  # of Meta's DINOv2
            extent = {"scale_factor": ((rows + 0.1) / grid[0], (columns + 0.1) / grid[1])}
        options = {"mode": mode.split("_")[0], "antialias": mode == "bicubic_antialias", **extent}
        resized = F.interpolate(patches, align_corners=False, **options)
        return torch.cat([self.pos_embed[:, :prefix], resized.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: Tensor) -> Tensor:
        config = self.config
        x = self.patch_embed(images)
        rows, columns = (side // config.patch_size for side in images.shape[2:])
        rotary = config.pos_embed_kind == "rotary"
        if not rotary and not config.pos_embed_prefix:
            x = x + self.positions(rows, columns)
        names = [name for name in ("cls_token", "dist_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([*(getattr(self, name).expand(len(x), -1, -1) for name in names), x], 1)
        if not rotary and config.pos_embed_prefix:
            x = x + self.positions(rows, columns)
        rotation = Rotation(config, rows, columns, x.dtype) if rotary else None
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)[:, config.num_prefix_tokens :]


class LinearDecoder(nn.Module):
    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class MaskTransformer(nn.Module):
    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        dim, classes = config.embed_dim, config.num_classes
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, dim))
        self.blocks = nn.ModuleList(Block(config, "decoder") for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, config.decoder_norm_eps)
        self.proj_patch = nn.Parameter(torch.zeros(dim, dim))
        self.proj_classes = nn.Parameter(torch.zeros(dim, dim))
        self.mask_norm = nn.LayerNorm(classes, config.decoder_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        classes = self.cls_emb.shape[1]
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, embeddings = x[:, :-classes] @ self.proj_patch, x[:, -classes:] @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return self.mask_norm(patches @ embeddings.transpose(1, 2))


class ReferenceSegmenter(nn.Module):
    """The oracle: same constructor argument, state dict and ``forward`` as ``segmenter_fast.Segmenter``."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisionTransformer(config)
        self.decoder = (MaskTransformer if config.decoder == "mask" else LinearDecoder)(config)

    def masks(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, h, w)`` scores of the patches of the zero-padded images.

        They are a view of the decoder's ``(B, h w, K)``, as in the official program: channels-last for every B, which
        ``interpolate`` and ``argmax`` keep.
        """
        patch = self.config.patch_size
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        grid = images.shape[2] // patch, images.shape[3] // patch
        return self.decoder(self.encoder(images)).unflatten(1, grid).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised images -> ``(B, K, H, W)`` logits."""
        height, width = images.shape[2:]
        masks, patch = self.masks(images), self.config.patch_size
        padded = (masks.shape[2] * patch, masks.shape[3] * patch)
        size = padded if self.config.upsample_to == "padded" else (height, width)
        return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[..., :height, :width]

    def segment(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, H, W)`` labels."""
        return self(images).argmax(1)

    def loss(self, images: Tensor, target: Tensor, ignore_index: int = 255, **options: Any) -> Tensor:
        """Mean cross-entropy against ``(B, H, W)`` class indices; ``options`` of ``F.cross_entropy``."""
        return F.cross_entropy(self(images), target, ignore_index=ignore_index, **options)
