"""The rotary position embedding of DINOv3.

Source: Siméoni et al., "DINOv3", 2025, and its program, without the random scaling of coordinates in training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Pair


def rotation_angles(grid: Pair, num_prefix_tokens: int, head_dim: int, temperature: float, like: Tensor) -> Tensor:
    """``(prefix + rows * columns, head_dim)`` angles by which channels of queries and keys are turned.

    A patch's row and column, each in (-1, 1) across the grid, turn pairs of channels of its queries and keys by angles
    ``2 pi coordinate / period``: the first half of the pairs by the row, the second by the column. The channels of a
    pair lie half a head apart. Prefix tokens are not turned. On the device of ``like``; float64 if ``like`` is, else
    float32, because low precision would move the patches.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.arange(head_dim // 4, dtype=dtype, device=like.device) / (head_dim // 4)
    y, x = (2 * (torch.arange(n, dtype=dtype, device=like.device) + 0.5) / n - 1 for n in grid)
    coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # (rows * columns, 2)
    angles = 2 * math.pi * coordinates[..., None] / temperature**exponents
    angles = angles.flatten(1).repeat(1, 2)  # (rows * columns, head_dim)
    return torch.cat([angles.new_zeros(num_prefix_tokens, head_dim), angles])


def rotation_table(angles: Tensor) -> Tensor:
    """``(..., N, head_dim)`` angles -> ``(2, ..., N, head_dim)`` cosines and sines."""
    return torch.stack([angles.cos(), angles.sin()])


def rotate(qkv: Tensor, table: Tensor) -> Tensor:
    """``(B, N, 3, heads, head_dim)`` with queries and keys turned by a ``rotation_table``; values are unchanged.

    Args:
        table: ``(2, N, head_dim)``, or ``(2, B, N, head_dim)`` where each image has its own.
    """
    cosines, sines = (table if table.ndim == 4 else table[:, None])[:, :, :, None, None]  # (1 or B, N, 1, 1, head_dim)
    turned = qkv[:, :, :2]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat([-second, first], -1) * sines
    return torch.cat([turned.to(qkv.dtype), qkv[:, :, 2:]], 2)
