"""``lattice_argmax``, ``lattice_softmax``: argument checks and registration. They have no derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import lattice as cpu
from ..registry import define, label_dtype, require_dtype, require_one_device

_SCORES = (torch.float32, torch.float64)


def lattice_argmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """Labels of pixels whose logits are bilinear mixes of four lattice points, for S lattices with one vote each.

    In lattice s the logits of pixel (y, x) are the mix of the points ``rows[s, i, y] + cols[s, j, x]``, i and j in
    (0, 1), by the weights ``row_weights[s, y]`` of i = 1 and ``col_weights[s, x]`` of j = 1. The label is the class
    with the largest mean softmax over the lattices, which for one lattice is the class with the largest logit.

    Args:
        scores: ``(N, K)`` float32 or float64, contiguous: the logits at all points of all lattices.
        rows, cols: ``(S, 2, H)`` and ``(S, 2, W)`` int64, contiguous; each sum of both must be in [0, N), which is
            not checked.
        row_weights, col_weights: ``(S, H)`` and ``(S, W)`` in the dtype of ``scores``, contiguous.
        index: ``(N,)`` int64, contiguous: point p has the scores ``scores[index[p]]``, and ``scores`` is
            ``(groups, K)``. An index outside [0, groups) is an IndexError on the CPU, and is not checked on a GPU.

    Returns:
        ``(H, W)``, uint8 where K <= 256 and int32 otherwise. Ties go to the lowest class, a NaN wins. Not
        differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    _check(scores, rows, row_weights, cols, col_weights, index)
    tensors = scores, rows, row_weights, cols, col_weights
    return torch.ops.segmenter_fast.lattice_argmax(*(tensor.detach() for tensor in tensors), index)


def lattice_softmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """Mean softmax over the lattices, ``(K, H, W)`` in the dtype of ``scores``; the rest as for ``lattice_argmax``."""
    _check(scores, rows, row_weights, cols, col_weights, index)
    tensors = scores, rows, row_weights, cols, col_weights
    return torch.ops.segmenter_fast.lattice_softmax(*(tensor.detach() for tensor in tensors), index)


def _check(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, points: Tensor | None
) -> None:
    require_dtype("scores", scores, *_SCORES)
    if scores.ndim != 2 or min(scores.shape) < 1 or not scores.is_contiguous():
        raise ValueError(f"scores must be (N, K), not empty and contiguous, got {_described(scores)}")
    for name, index, weight in (("row", rows, row_weights), ("col", cols, col_weights)):
        require_dtype(f"{name}s", index, torch.int64)
        if index.ndim != 3 or index.shape[1] != 2 or min(index.shape) < 1 or not index.is_contiguous():
            raise ValueError(f"{name}s must be (S, 2, outputs), not empty and contiguous, got {_described(index)}")
        wanted = (index.shape[0], index.shape[2])
        if weight.dtype != scores.dtype or tuple(weight.shape) != wanted or not weight.is_contiguous():
            given = f"{_described(weight)}, {weight.dtype}"
            raise ValueError(f"{name}_weights must be {wanted}, {scores.dtype} and contiguous, got {given}")
    if len(rows) != len(cols):
        raise ValueError(f"rows and cols must have one entry for each lattice, got {len(rows)} and {len(cols)}")
    if points is not None:
        require_dtype("index", points, torch.int64)
        if points.ndim != 1 or len(points) < 1 or not points.is_contiguous():
            raise ValueError(f"index must be (N,), not empty and contiguous, got {_described(points)}")
    axes = dict(rows=rows, row_weights=row_weights, cols=cols, col_weights=col_weights)
    require_one_device(scores=scores, **axes, index=points)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} with strides {tensor.stride()}"


_ARGUMENTS = (
    "(Tensor scores, Tensor rows, Tensor row_weights, Tensor cols, Tensor col_weights, Tensor? index=None) -> Tensor"
)
define(
    f"lattice_argmax{_ARGUMENTS}",
    triton=".gpu.lattice_argmax:lattice_argmax",
    plain=cpu.lattice_argmax,
    fake=lambda scores, rows, row_weights, cols, col_weights, index=None: scores.new_empty(
        (rows.shape[2], cols.shape[2]), dtype=label_dtype(scores.shape[1])
    ),
)
define(
    f"lattice_softmax{_ARGUMENTS}",
    triton=".gpu.lattice:lattice_softmax",
    plain=cpu.lattice_softmax,
    fake=lambda scores, rows, row_weights, cols, col_weights, index=None: scores.new_empty(
        (scores.shape[1], rows.shape[2], cols.shape[2])
    ),
)
