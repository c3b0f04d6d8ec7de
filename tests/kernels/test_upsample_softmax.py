"""upsample_softmax against float64 interpolate + softmax: values and gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from support.accuracy import assert_op_as_accurate, assert_op_equals

from .conftest import Backend


def check(masks: Tensor, **options) -> None:
    """Probabilities and gradient are as accurate as PyTorch's in the dtype of the masks."""
    crop = options.get("crop") or options["size"]
    # The gradient that a channels-last loss leaves: strides need not be those of the output.
    grad = torch.randn(masks.shape[0], *crop, masks.shape[1], device=masks.device).permute(0, 3, 1, 2)
    ours = assert_op_as_accurate(kernels.upsample_softmax, reference.upsample_softmax, [masks], grad, **options)
    assert ours[0].is_contiguous()
    assert ours[0].dtype == ours[1].dtype == masks.dtype


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("crop", [None, (5, 7)])
def test_crop_and_alignment(backend: Backend, crop: tuple[int, int] | None, align_corners: bool) -> None:
    check(backend.masks(19), size=(6, 9), crop=crop, align_corners=align_corners)


def test_every_dtype(backend: Backend) -> None:
    for dtype in (*backend.dtypes, torch.float64):
        check(backend.masks(7).to(dtype), size=(6, 9))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(backend: Backend, data: st.DataObject) -> None:
    side = st.integers(1, 4)
    b, k, h, w = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 18), side, side), "masks")
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)), "size")
    crop = tuple(data.draw(st.integers(1, full), "crop") for full in size)
    check(backend.masks(k, h, w, b), size=size, crop=crop, align_corners=data.draw(st.booleans(), "align_corners"))


def test_cells_larger_than_a_tile(backend: Backend) -> None:
    check(backend.masks(8, 1, 2, 2), size=(20, 35))


def test_lanes_take_neighbours(backend: Backend) -> None:
    """Cells of 4, 8 and 16 columns, across programs and cropped; half precision takes powers of exponentials."""
    for dtype in backend.dtypes:
        masks = backend.masks(5, 2, 9, 1).to(dtype)
        check(masks, size=(32, 144))
        check(masks * 8, size=(8, 72), crop=(7, 68))  # too far apart for powers
        check(masks[..., :5], size=(10, 20))


def test_one_class_is_certain(backend: Backend) -> None:
    assert (kernels.upsample_softmax(backend.masks(1) * 10, (6, 9)) == 1).all()


def test_strides(backend: Backend) -> None:
    masks = torch.randn(3, 4, 5, 6, device=backend.device)[..., ::2].permute(2, 0, 3, 1)[:2]  # (2, 3, 3, 4)
    check(masks, size=(5, 7))
    check(masks[:1, :, 1:].expand(2, -1, -1, -1), size=(4, 8))


def test_empty_batch(backend: Backend) -> None:
    masks = backend.masks(3, b=0).requires_grad_()
    out = kernels.upsample_softmax(masks, (6, 9))
    assert out.shape == (0, 3, 6, 9)
    assert torch.autograd.grad(out.sum(), masks)[0].shape == masks.shape


def test_extreme_values(backend: Backend) -> None:
    masks = backend.masks(5)
    spread = backend.masks(5, b=6)  # enough pixels that luck in rounding 1e4 evens out
    spread[:, 0, 0, 0], spread[:, 0, 1, 1], spread[:, 1, 1, 2] = 1e4, -1e4, 1e4
    for extreme in (spread, masks + 1e4, masks * 1e-30, masks * 40):
        check(extreme, size=(8, 12))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_masks(backend: Backend, value: float) -> None:
    """One class of a point, and all 5 of it, which fill no block: NaNs reach what they reach in PyTorch."""
    point, every_class = backend.masks(5, 3, 3, 1), backend.masks(5, 2, 2, 1)
    point[0, 0, 1, 1] = every_class[0, :, 0, 1] = value
    cases = [(point, (4, 6), False), (every_class, (3, 4), True)]  # weights of exactly 0
    if backend.device == "cpu":
        cases.append((point, (3, 5), False))  # PyTorch's GPU kernel multiplies a row by 0 that only other sizes need
    for masks, size, align_corners in cases:
        grad = torch.randn(1, 5, *size, device=backend.device)
        options = {"size": size, "align_corners": align_corners}
        assert_op_equals(kernels.upsample_softmax, reference.upsample_softmax, [masks], grad, **options)


def test_autocast_gives_float32(backend: Backend) -> None:
    masks = backend.masks(7).half().requires_grad_()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out = kernels.upsample_softmax(masks, (6, 9))
    assert out.dtype == torch.float32
    assert torch.equal(out, kernels.upsample_softmax(masks.float(), (6, 9)))
    assert torch.autograd.grad(out[:, 0].sum(), masks)[0].dtype == torch.float16


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Two images, or the last two classes, are more than 2^30 elements apart."""
    values, memory = torch.randn(2, 3, 2, 2, device=backend.device).half(), backend.sparse_memory((1 << 31) + 512)
    backward = torch.ops.segmenter_fast.upsample_softmax_backward
    for strides in (((1 << 31) + 64, 1, 12, 3), (16, (1 << 30) + 64, 6, 3)):
        far = memory.as_strided((2, 3, 2, 2), strides).copy_(values)
        p = kernels.upsample_softmax(far, (4, 4))
        assert torch.equal(p, kernels.upsample_softmax(values, (4, 4)))
        p = p[..., :2, :2]
        assert torch.equal(backward(far, p, (1, 1), (2, 2), False), backward(values, p, (1, 1), (2, 2), False))
