"""Rotary position embedding of image patches, as DINOv3 has it.

A patch's row and column, each in (-1, 1) from one edge of the grid to the other, turn pairs of channels of its queries
and keys by angles ``2 pi coordinate / period``: the first half of the pairs by the row, the second by the column. The
channels of a pair lie half a head apart. Prefix tokens are not turned.

Source: Siméoni et al., "DINOv3", 2025, and its program, without the random scaling of coordinates in training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Pair


def rotation_table(grid: Pair, num_prefix_tokens: int, head_dim: int, temperature: float, like: Tensor) -> Tensor:
    """``(2, prefix + rows * columns, head_dim)`` cosines and sines, on the device of ``like``.

    float32, or float64 for a float64 ``like``: low precision would move the patches.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.arange(head_dim // 4, dtype=dtype, device=like.device) / (head_dim // 4)
    y, x = (2 * (torch.arange(n, dtype=dtype, device=like.device) + 0.5) / n - 1 for n in grid)
    coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # (rows * columns, 2)
    angles = 2 * math.pi * coordinates[..., None] / temperature**exponents
    angles = angles.flatten(1).repeat(1, 2)  # (rows * columns, head_dim)
    angles = torch.cat([angles.new_zeros(num_prefix_tokens, head_dim), angles])
    return torch.stack([angles.cos(), angles.sin()])


def rotate(qkv: Tensor, table: Tensor) -> Tensor:
    """``(B, N, 3, heads, head_dim)`` with queries and keys turned by ``rotation_table``; values stay."""
    cosines, sines = table[:, None, :, None, None]  # (1, N, 1, 1, head_dim) each
    turned = qkv[:, :, :2]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat([-second, first], -1) * sines
    return torch.cat([turned.to(qkv.dtype), qkv[:, :, 2:]], 2)
