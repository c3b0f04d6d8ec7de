"""The encoder: a plain Vision Transformer whose attention is ``kernels.attention``.

Parameter names are those of timm and of the official Segmenter program.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import Pair, SegmenterConfig
from .merging import Groups, run_blocks
from .patches import channels_last_maps, check_images, pad_to_patches, project_patches
from .rotary import rotate, rotation_angles, rotation_table
from .token_merging import TokenMerging


class Attention(nn.Module):
    """Multi-head self-attention on a packed projection.

    The fused op has no dropout of the probabilities: training with a dropout above 0 runs PyTorch's
    ``scaled_dot_product_attention``.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def packed_qkv(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """``(B, N, D)`` -> ``(B, N, 3, heads, D / heads)``, queries and keys rotated where there is a rotation."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return qkv if rotation is None else rotate(qkv, rotation)

    def forward(self, x: Tensor, rotation: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        qkv = self.packed_qkv(x, rotation)
        if self.training and self.dropout:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mask = None if bias is None else bias[:, None, None].to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout).transpose(1, 2)
        else:
            out = kernels.attention(qkv, bias=bias)
        return F.dropout(self.proj(out.flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class SwiGlu(nn.Module):
    """Two linear layers around a gate, ``silu(gate) * value`` (DINOv3 S+ and H+).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.silu(self.fc1_g(x)) * self.fc1_x(x), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class LayerScale(nn.Module):
    """A learned factor per channel (DINOv2, DINOv3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: training drops a sample's whole residual branch with probability ``rate``.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))


class Block(nn.Module):
    """A pre-norm transformer layer of the encoder or, with ``decoder``, of the mask transformer."""

    def __init__(self, config: SegmenterConfig, drop_path: float, decoder: bool = False) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, int(config.mlp_ratio * config.embed_dim)
        num_heads, eps, dropout = config.num_heads, config.encoder_norm_eps, config.dropout
        qkv_bias, layer_scale, swiglu = config.qkv_bias, config.layer_scale, config.mlp == "swiglu"
        if decoder:
            num_heads, eps, dropout = config.decoder_num_heads, config.decoder_norm_eps, config.decoder_dropout
            qkv_bias, layer_scale, swiglu = True, False, False
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, dropout, qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = SwiGlu(dim, hidden + -hidden % 8, dropout) if swiglu else Mlp(dim, hidden, dropout)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotation, bias)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def make_blocks(config: SegmenterConfig, decoder: bool = False) -> nn.ModuleList:
    """All layers of a part; stochastic depth rises linearly from 0 at the first to the configured rate at the last."""
    depth, last = config.depth, config.drop_path_rate
    if decoder:
        depth, last = config.decoder_depth, config.decoder_drop_path_rate
    return nn.ModuleList(Block(config, last * layer / max(depth - 1, 1), decoder) for layer in range(depth))


def resize_positions(positions: Tensor, grid: Pair, size: Pair, mode: str) -> Tensor:
    """``(1, prefix + rows * columns, D)`` position embedding from one grid of patches to another.

    The entries of prefix tokens are unchanged; ``mode`` is a configuration's ``pos_embed_mode``.
    """
    prefix = positions.shape[1] - grid[0] * grid[1]
    patches = channels_last_maps(positions[:, prefix:], grid)
    if patches.dtype != torch.float64:
        patches = patches.float()
    kind, _, option = mode.partition("_")
    scales = [(n + 0.1) / m for n, m in zip(size, grid, strict=True)]
    extent: dict[str, Any] = {"scale_factor": scales} if option == "offset" else {"size": size}
    resized = F.interpolate(patches, mode=kind, align_corners=False, antialias=option == "antialias", **extent)
    return torch.cat([positions[:, :prefix], resized.flatten(2).mT.to(positions.dtype)], 1)


class PatchEmbed(nn.Module):
    """Non-overlapping patches of zero-padded images, each projected to one token: ``(B, D, h, w)``."""

    def __init__(self, patch_size: int, dim: int, in_channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, channels=self.proj.in_channels)
        images = pad_to_patches(images.to(self.proj.weight.dtype), self.patch_size)
        return project_patches(images, self.proj.weight, self.proj.bias)


class VisionTransformer(nn.Module):
    """``(B, C, H, W)`` normalised images of any size -> ``(B, h w, D)`` features of the zero-padded images' patches."""

    ops: Any = kernels
    """Ops of token merging."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        dim, (rows, columns) = config.embed_dim, config.grid
        self.config, self.merging = config, config.merging
        self.grid, self.num_prefix_tokens = (rows, columns), config.num_prefix_tokens
        self.patch_embed = PatchEmbed(config.patch_size, dim, config.in_channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.distillation_token else None
        registers = config.num_register_tokens
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        positions = rows * columns + (self.num_prefix_tokens if config.pos_embed_prefix else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim)) if config.pos_embed_kind == "learned" else None
        self.blocks = make_blocks(config)
        self.norm = nn.LayerNorm(dim, config.encoder_norm_eps)
        self.frozen = False
        # The classification heads of official checkpoints: kept so that saving loses nothing, never run or trained.
        if config.head_classes:
            self.head = nn.Linear(dim, config.head_classes).requires_grad_(False)
            if config.distillation_token:
                self.head_dist = nn.Linear(dim, config.head_classes).requires_grad_(False)

    def grid_embeddings(
        self, rows: int, columns: int, merging: TokenMerging | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Prefix tokens and positions for a grid of patches.

        A learned position embedding is resized if the number of patches changes; in some modes also if only the
        aspect ratio does.

        Returns:
            ``(1, prefix, D)`` class, distillation and register tokens with their positions, ``(1, rows * columns, D)``
            learned positions of the patches or None, and the rotation that ``run_blocks`` takes, or None.
        """
        config, grid, count, like = self.config, (rows, columns), self.num_prefix_tokens, self.patch_embed.proj.weight
        tokens: list[Tensor] = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens, 1) if tokens else like.new_empty(1, 0, config.embed_dim)
        positions: Tensor | None = self.pos_embed
        if positions is None:
            head_dim = config.embed_dim // config.num_heads
            angles = rotation_angles(grid, count, head_dim, config.rope_temperature, like)
            return prefix, None, rotation_table(angles) if merging is None else angles
        same_count = rows * columns == self.grid[0] * self.grid[1] and "_" not in config.pos_embed_mode
        if grid != self.grid and not same_count:
            positions = resize_positions(positions, self.grid, grid, config.pos_embed_mode)
        if config.pos_embed_prefix:
            prefix, positions = prefix + positions[:, :count], positions[:, count:]
        return prefix, positions, None

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, C, H, W)`` -> ``(B, prefix + h w, D)`` tokens with their learned positions; the rotation, if any."""
        patches = self.patch_embed(images)
        prefix, positions, rotation = self.grid_embeddings(patches.shape[2], patches.shape[3], self.merging)
        patches = patches.flatten(2).mT  # (B, h w, D)
        if positions is not None:
            patches = patches + positions
        tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], 1)
        return F.dropout(tokens, self.config.dropout, self.training), rotation

    def freeze(self, frozen: bool = True) -> None:
        """Exclude every parameter from training, or include it again; see ``Segmenter.freeze_encoder``."""
        self.frozen = frozen
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen and not name.startswith(("head.", "head_dist.")))

    def train(self, mode: bool = True) -> VisionTransformer:
        """Set the mode, as in every module, but keep a frozen encoder in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        features, groups = self.merged(images)
        return features if groups is None else groups.spread(features)

    def merged(self, images: Tensor) -> tuple[Tensor, Groups | None]:
        """``(B, 3, H, W)`` -> ``(B, groups, D)`` features of groups of patches, and the groups; see ``run_blocks``."""
        patch = self.config.patch_size
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x, rotation = self.embed(images)
            grid = -(-images.shape[2] // patch), -(-images.shape[3] // patch)
            x, groups = run_blocks(self.blocks, x, rotation, grid, self.merging, self.ops)
            return self.norm(x)[:, self.num_prefix_tokens :], groups
