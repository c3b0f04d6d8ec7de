"""Launchers refuse more programs than a launch takes, and bound the offsets of their tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from segmenter_fast.kernels.registry import HAS_TRITON, INTERPRET

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET is set: launches cannot be recorded", allow_module_level=True)

from segmenter_fast.kernels import aot
from segmenter_fast.kernels.bilinear import Axis
from segmenter_fast.kernels.gpu import launches
from segmenter_fast.kernels.gpu.cells import MOST_OFFSET, aligned, wide
from segmenter_fast.kernels.gpu.common import programs
from segmenter_fast.kernels.gpu.corners import sum_parts
from segmenter_fast.kernels.gpu.launches import empty
from segmenter_fast.kernels.loss_options import LossOptions

MANY = 1 << 20
SIDE = 1 << 10


def cross_entropy(with_grad: bool) -> object:
    options = LossOptions((SIDE, SIDE), 255, None, 0.0, "sum", align_corners=False)
    return launches.upsample_cross_entropy(MASKS, empty(MANY, SIDE, SIDE, dtype=torch.uint8), options, with_grad)


def lattice(op: Callable[..., object]) -> object:
    index, weights = empty(1, 2, MANY, dtype=torch.int64), empty(1, MANY)
    return op(empty(4, 2), index, weights, index, weights)


MASKS = empty(MANY, 2, SIDE, SIDE)
PATCHES = empty(MANY, MANY, 4)
QKV = empty(MANY, 65, 3, MANY, 16)
ROWS = empty(MANY, MANY, 65)
CALLS: dict[str, Callable[[], object]] = {
    "attention": lambda: launches.attention_forward(QKV, 0.125, False),
    "attention backward": lambda: launches.attention_backward(QKV[:, :, 0], QKV, QKV[:, :, 0], ROWS, 0.125),
    "mask_scores": lambda: launches.mask_scores(PATCHES, PATCHES[:, :3], *[empty(3)] * 2, 1e-5),
    "mask_scores backward": lambda: launches.mask_scores_backward(
        empty(MANY, MANY, 3), PATCHES, PATCHES[:, :3], *[empty(3)] * 2, 1e-5
    ),
    "lattice_argmax": lambda: lattice(launches.lattice_argmax),
    "lattice_softmax": lambda: lattice(launches.lattice_softmax),
    "upsample_argmax": lambda: launches.upsample_argmax(MASKS, (SIDE, SIDE), (SIDE, SIDE), False),
    "sum_parts": lambda: sum_parts(empty(9), None, MASKS),
    "upsample_cross_entropy": lambda: cross_entropy(False),
    "upsample_cross_entropy with gradient": lambda: cross_entropy(True),
    "upsample_softmax": lambda: launches.upsample_softmax(MASKS, (SIDE, SIDE), (SIDE, SIDE), False),
    "upsample_softmax backward": lambda: launches.upsample_softmax_backward(
        MASKS, MASKS, (SIDE, SIDE), (SIDE, SIDE), False
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_more_programs_than_a_launch_takes_are_an_error(name: str) -> None:
    """Tensors on the meta device, of terabytes."""
    with pytest.raises(ValueError, match=r"of shape \(.* need .* programs, a launch takes at most 2147483647"):
        launches.record(aot.CHIPS["sm_90"].target, iter([(name, CALLS[name])]))


def test_a_grid_may_be_full() -> None:
    assert programs(2**31 - 1, masks=(2, 3)) == (2**31 - 1,)
    assert programs(5, 65535, masks=(2, 3)) == (5, 65535)
    for grid in ((2**31,), (1, 65536)):
        with pytest.raises(ValueError, match=r"masks of shape \(2, 3\) need .* split the batch"):
            programs(*grid, masks=(2, 3))


def test_offsets_need_64_bits_where_a_product_or_an_offset_does() -> None:
    small, large = Axis.make(4, 64), Axis.make(4, (1 << 29) + 1)
    assert [wide(small, small, MOST_OFFSET - 1), wide(small, small, MOST_OFFSET)] == [False, True]
    assert wide(small, large)
    assert [aligned(512), aligned(8, 24, 0), aligned(500, 2), aligned(333, 8)] == [16, 8, 2, 1]
