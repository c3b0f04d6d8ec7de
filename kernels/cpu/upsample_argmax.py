"""Labels of bilinearly upsampled masks: the C++ kernel of ``src/upsample_argmax.cpp``, or PyTorch image by image.

Two cores of an AMD EPYC (Zen 5), 150 float32 classes, channels-last, to 512 x 512, this and interpolate + argmax: from
32 x 32 noise 1.1 and 88 ms, smooth maps 0.88 and 86 ms; from 256 x 256 noise 5.1 and 94 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from ..registry import label_dtype, statistics_dtype
from .groups import used_groups
from .labels import run_native
from .lattice import lattice_argmax
from .native import kernel


def upsample_argmax(
    masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, index: Tensor | None = None
) -> Tensor:
    """``(B, K, h, w)``, or ``(B, K, groups)`` with an index -> ``(B, H, W)``, uint8 if K <= 256 and else int32."""
    _, num_classes, h, w = shape_on_grid(masks, index)
    labels = masks.new_empty((masks.shape[0], *crop), dtype=label_dtype(num_classes))
    if num_classes == 1:
        return labels.zero_()
    masks = masks.float() if masks.dtype == torch.float16 else masks
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip((h, w), size, crop, strict=True))
    run = kernel(masks, "upsample_argmax")
    if run is not None:
        batch_stride, class_stride, *steps = masks.stride()
        point_stride = 1
        if index is not None:
            used_groups(index, masks.shape[2])
            index, steps, point_stride = index.flatten(1).contiguous(), [w, 1], steps[0]
        rows, cols = _taps(ys, steps[0]), _columns(xs, steps[1])
        run_native(run, masks, (batch_stride, class_stride, point_stride), index, rows, cols, labels)
        return labels
    (top, bottom, v), (left, right, u) = ys.taps(masks.device), xs.taps(masks.device)
    dtype, pairs = statistics_dtype(masks.dtype), (torch.stack((top, bottom)) * w, torch.stack((left, right)))
    tables = (pairs[0][None], v.to(dtype)[None], pairs[1][None], u.to(dtype)[None])
    for image, groups, out in zip(masks, [None] * len(masks) if index is None else index, labels, strict=True):
        points = None if groups is None else groups.flatten()
        used = image[:, : int(bottom.max()) + 1] if groups is None else image
        out.copy_(lattice_argmax(used.to(dtype).flatten(1).T.contiguous(), *tables, points))
    return labels


@lru_cache(maxsize=256)
def _taps(axis: Axis, step: int) -> tuple[Tensor, Tensor]:
    """``(2, kept)`` inputs, times ``step``, that each output mixes, and ``(kept,)`` float32 weights of the second."""
    lower, upper, weight = axis.taps()
    return torch.stack((lower, upper)) * step, weight.float()


@lru_cache(maxsize=256)
def _columns(axis: Axis, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs without repetition, times ``step``, positions ``(2, kept)`` of those of ``_taps``, and the weights."""
    pairs, weight = _taps(axis, step)
    return *pairs.unique(return_inverse=True), weight
