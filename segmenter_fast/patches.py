"""Images cut into patches, and values of patches as maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_images(images: Tensor, uint8: bool = False, channels: int = 3) -> None:
    """Refuse anything but ``(B, C, H, W)`` floating point images, or uint8 ones where ``uint8`` allows them."""
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < 1:
        raise ValueError(f"images must be (B, {channels}, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point() and not (uint8 and images.dtype == torch.uint8):
        allowed = "uint8, or floating point and normalised" if uint8 else "floating point and normalised"
        raise TypeError(f"images must be {allowed}, got {images.dtype}; segmenter_fast.predict takes uint8 images")


def pad_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` zero-padded at the bottom and right to whole patches."""
    # Not -side % patch_size: the compiler's symbolic sizes have no modulus of a negative number.
    below, right = ((patch_size - side % patch_size) % patch_size for side in images.shape[2:])
    return F.pad(images, (0, right, 0, below)) if below or right else images


def channels_last_maps(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """``(B, h w, D)`` values of a grid of patches -> ``(B, D, h, w)`` maps, a view.

    It has the official program's strides: PyTorch sees channels-last maps, at batch 1, too. A transposed view has a
    batch stride of D there, and ``interpolate`` then copies its full-size result twice.
    """
    return tokens.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)


def project_patches(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, C, h P, w P)`` images convolved by ``(D, C, P, P)`` with a stride of P: ``(B, D, h, w)``.

    A matrix product except on a CPU: PyTorch's convolution took 10 % of the time of a B/16 in bfloat16 on an H200.
    """
    if images.device.type == "cpu":
        return F.conv2d(images, weight, bias, stride=weight.shape[-1])
    return multiply_patches(images, weight, bias)


def multiply_patches(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``project_patches`` as one matrix product of cut-out patches."""
    side = weight.shape[-1]
    rows, columns = images.shape[2] // side, images.shape[3] // side
    patches = images.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
    return channels_last_maps(F.linear(patches.flatten(3).flatten(1, 2), weight.flatten(1), bias), (rows, columns))
