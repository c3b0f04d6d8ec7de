"""Groups of patches that share their scores: where kernels find those, and the transpose of the gather in Triton.

The gradient of a group is the sum of its patches' gradients, always in the order of the patches. A first kernel links
each group to its first patch and each patch to the next one of its group, by comparing all pairs. A program of the
second one owns BLOCK_G groups and follows their links. Nothing is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, programs


def strides_on_grid(masks: Tensor, index: Tensor | None) -> Sequence[int]:
    """Strides ``(B, K, h, w)`` of masks; with an index ``(B, K, 0, groups)``."""
    strides = masks.stride()
    return strides if index is None else (*strides[:2], 0, strides[2])


def contiguous(index: Tensor | None) -> Tensor | None:
    """The index as the kernels take it."""
    return None if index is None else index.contiguous()


@triton.jit(do_not_specialize=["groups", "patches"])
def links_kernel(
    index_ptr,  # (B, patches)
    links_ptr,  # (B, groups + patches): the first patch of each group, then the next one behind each patch
    groups, patches,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """BLOCK links of an image; those that lead nowhere are the number of patches."""
    index_ptr += tl.program_id(1).to(tl.int64) * patches
    links_ptr += tl.program_id(1).to(tl.int64) * (groups + patches)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = rows - groups  # the patch, negative for a group
    group = tl.where(here < 0, rows, tl.load(index_ptr + here, mask=(here >= 0) & (here < patches), other=-1))
    found = tl.zeros((BLOCK,), tl.int32) + patches
    for start in range(0, patches, STEP):
        offs = start + tl.arange(0, STEP)
        others = tl.load(index_ptr + offs, mask=offs < patches, other=-1)
        follows = (others[None, :] == group[:, None]) & (offs[None, :] > here[:, None]) & (offs < patches)[None, :]
        found = tl.minimum(found, tl.min(tl.where(follows, offs[None, :], patches), 1))
    tl.store(links_ptr + rows, found, mask=rows < groups + patches)


@triton.jit(do_not_specialize=["groups", "patches", "num_classes"])
def sum_groups_kernel(
    grad_ptr,  # (B, K, patches)
    links_ptr,  # (B, groups + patches)
    out_ptr,  # (B, K, groups)
    grad_strides, out_strides, groups, patches, num_classes,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_G groups of an image, for BLOCK_K classes."""
    b = tl.program_id(1).to(tl.int64)
    blocks_k = tl.cdiv(num_classes, BLOCK_K)
    offs_g = tl.program_id(0) // blocks_k * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_k = (tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_g, mask_k = offs_g < groups, (offs_k < num_classes)[None, :]
    grad_ptr += b * grad_strides[0] + (offs_k * grad_strides[1])[None, :]
    links_ptr += b * (groups + patches)
    patch = tl.load(links_ptr + offs_g, mask=mask_g, other=patches)
    grad = tl.zeros((BLOCK_G, BLOCK_K), grad_ptr.dtype.element_ty)
    while tl.min(patch, 0) < patches:
        mask = patch < patches
        rows = (patch.to(tl.int64) * grad_strides[2])[:, None]
        grad += tl.load(grad_ptr + rows, mask=mask[:, None] & mask_k, other=0.0)
        patch = tl.load(links_ptr + groups + patch, mask=mask, other=patches)
    ptrs = out_ptr + b * out_strides[0] + (offs_g.to(tl.int64) * out_strides[2])[:, None]
    ptrs += (offs_k * out_strides[1])[None, :]
    tl.store(ptrs, grad.to(out_ptr.dtype.element_ty), mask=mask_g[:, None] & mask_k)


def sum_groups(grad: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Sums of the gradients ``(B, K, h, w)`` of each group's patches, written to ``(B, K, groups)`` ``out``."""
    grad, index = grad.flatten(2), index.flatten(1).contiguous()
    batch, num_classes, groups = out.shape
    patches = index.shape[1]
    if not batch:
        return out
    links = index.new_empty((batch, groups + patches), dtype=torch.int32)
    links_kernel[programs(cdiv(groups + patches, 32), batch, index=index.shape)](
        index_ptr=index, links_ptr=links, groups=groups, patches=patches, BLOCK=32, STEP=128, num_warps=4
    )
    sum_groups_kernel[programs(cdiv(groups, 4) * cdiv(num_classes, 32), batch, masks=out.shape)](
        grad_ptr=grad,
        links_ptr=links,
        out_ptr=out,
        grad_strides=grad.stride(),
        out_strides=out.stride(),
        groups=groups,
        patches=patches,
        num_classes=num_classes,
        BLOCK_G=4,
        BLOCK_K=32,
        num_warps=1,
    )
    return out
