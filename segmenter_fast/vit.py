"""The encoder: a plain Vision Transformer whose attention is ``kernels.attention``.

Parameter names are those of timm and of the official Segmenter program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import Pair, SegmenterConfig
from .rope import rotate, rotation_table


class Attention(nn.Module):
    """Multi-head self-attention on a packed projection.

    Dropout of the attention probabilities, which the fused op does not have, goes through PyTorch's
    ``scaled_dot_product_attention``; it happens only in training with a dropout above 0.
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

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        qkv = self.packed_qkv(x, rotation)
        if self.training and self.dropout:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).transpose(1, 2)
        else:
            out = kernels.attention(qkv)
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
    """Two linear layers around a gate, ``silu(gate) * value``, as the larger DINOv3 models have.

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
    """A learnt factor per channel, as DINOv2 has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training a whole residual branch is dropped for a sample with probability ``rate``.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        norm_eps: float,
        dropout: float,
        drop_path: float,
        layer_scale: bool = False,
        qkv_bias: bool = True,
        mlp: str = "gelu",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, num_heads, dropout, qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, hidden, dropout) if mlp == "gelu" else SwiGlu(dim, hidden + -hidden % 8, dropout)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotation)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of stochastic depth, rising linearly from 0 at the first layer to ``last`` at the last."""
    return [last * layer / max(depth - 1, 1) for layer in range(depth)]


def resize_positions(positions: Tensor, grid: Pair, size: Pair, mode: str) -> Tensor:
    """``(1, prefix + rows * columns, D)`` position embedding from one grid of patches to another.

    Entries before the patches stay; ``mode`` is a configuration's ``pos_embed_mode``.
    """
    prefix = positions.shape[1] - grid[0] * grid[1]
    patches = positions[:, prefix:].mT.unflatten(2, grid)
    if patches.dtype != torch.float64:
        patches = patches.float()
    kind, _, antialias = mode.partition("_")
    resized = F.interpolate(patches, size=size, mode=kind, align_corners=False, antialias=bool(antialias))
    return torch.cat([positions[:, :prefix], resized.flatten(2).mT.to(positions.dtype)], 1)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to one token."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, h w, D)


class VisionTransformer(nn.Module):
    """``(B, 3, H, W)`` images, H and W multiples of the patch size -> ``(B, h w, D)`` patch features."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        dim, (rows, columns) = config.embed_dim, config.grid
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.distillation_token else None
        registers = config.num_register_tokens
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        positions = rows * columns + (config.num_prefix_tokens if config.pos_embed_prefix else 0)
        learned = config.pos_embed_kind == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim)) if learned else None
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                int(config.mlp_ratio * dim),
                config.encoder_norm_eps,
                config.dropout,
                rate,
                config.layer_scale,
                config.qkv_bias,
                config.mlp,
            )
            for rate in drop_path_rates(config.drop_path_rate, config.depth)
        )
        self.norm = nn.LayerNorm(dim, config.encoder_norm_eps)
        self.frozen = False
        # The classification heads of official checkpoints: kept so that nothing is lost, never run or trained.
        if config.head_classes:
            self.head = nn.Linear(dim, config.head_classes).requires_grad_(False)
            if config.distillation_token:
                self.head_dist = nn.Linear(dim, config.head_classes).requires_grad_(False)

    def prefix_tokens(self) -> list[Tensor]:
        """Class, distillation and register tokens, as far as there are any, ``(1, n, D)`` each."""
        return [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]

    def positions(self, rows: int, columns: int) -> Tensor | None:
        """``(1, n, D)`` learned position embedding for a grid, None where there is none.

        It is resized where the number of patches differs; in timm's mode also where only the aspect ratio does.
        """
        before, mode = self.config.grid, self.config.pos_embed_mode
        if self.pos_embed is None or (rows, columns) == before:
            return self.pos_embed
        if rows * columns == before[0] * before[1] and mode != "bicubic_antialias":
            return self.pos_embed
        return resize_positions(self.pos_embed, before, (rows, columns), mode)

    def rotation(self, rows: int, columns: int) -> Tensor | None:
        """``(2, prefix + rows * columns, D / heads)`` cosines and sines of a rotary embedding, None without one."""
        config = self.config
        if config.pos_embed_kind != "rotary":
            return None
        head_dim = config.embed_dim // config.num_heads
        like = self.patch_embed.proj.weight
        return rotation_table((rows, columns), config.num_prefix_tokens, head_dim, config.rope_temperature, like)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, 3, H, W)`` -> ``(B, prefix + h w, D)`` tokens with their learned positions; the rotation, if any."""
        grid = images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size
        tokens = self.patch_embed(images)
        positions = self.positions(*grid)
        prefix = [token.expand(images.shape[0], -1, -1) for token in self.prefix_tokens()]
        if positions is None:
            tokens = torch.cat([*prefix, tokens], 1)
        elif self.config.pos_embed_prefix:
            tokens = torch.cat([*prefix, tokens], 1) + positions
        else:
            tokens = torch.cat([*prefix, tokens + positions], 1)
        return F.dropout(tokens, self.config.dropout, self.training), self.rotation(*grid)

    def patches(self, x: Tensor) -> Tensor:
        """The last layer's ``(B, prefix + h w, D)`` tokens -> normalised patch features ``(B, h w, D)``."""
        return self.norm(x)[:, self.config.num_prefix_tokens :]

    def freeze(self, frozen: bool = True) -> None:
        """Take every parameter out of training, or put it back in; see ``Segmenter.freeze_encoder``."""
        self.frozen = frozen
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen and not name.startswith(("head.", "head_dist.")))

    def train(self, mode: bool = True) -> VisionTransformer:
        """As any module's, but a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x, rotation = self.embed(images)
            for block in self.blocks:
                x = block(x, rotation)
            return self.patches(x)
