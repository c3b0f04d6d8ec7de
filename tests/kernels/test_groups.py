"""The ``index`` of the upsample and lattice ops: results are those of gathered scores, gradients sums over groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from segmenter_fast.kernels.registry import INTERPRET
from support.accuracy import assert_op_as_accurate, assert_op_equals, with_gradients

from .conftest import Backend
from .test_lattice import draw as lattices

# Batch, classes, grid, groups, size, crop, align_corners: whole and odd ratios, one group, several tiles of a cell.
CASES = [
    (2, 7, (3, 2), 4, (11, 7), (10, 6), False),
    (1, 19, (2, 2), 3, (16, 16), None, False),
    (3, 5, (2, 3), 1, (5, 4), None, True),
    (1, 33, (2, 3), 4, (2, 3), None, False),
    (1, 4, (5, 2), 8, (3, 2), None, False),
    (1, 3, (1, 2), 2, (5, 20), (4, 18), True),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def draw(case: tuple, backend: Backend, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Masks of groups, the index of the patches, and the other arguments."""
    batch, classes, grid, groups, size, crop, align_corners = case
    masks = torch.randn(batch, groups, classes, device=backend.device, dtype=dtype).mT
    index = torch.randint(0, groups, (batch, *grid), device=backend.device)
    return masks, index, {"size": size, "crop": crop, "align_corners": align_corners}


def loss_options(case: tuple, backend: Backend, reduction: str) -> dict[str, Any]:
    batch, classes, _, _, size, crop, align_corners = case
    target = torch.randint(0, classes, (batch, *(crop or size)), device=backend.device)
    target[:, ::3, 1::2] = 255
    return {"target": target, "size": size, "reduction": reduction, "align_corners": align_corners}


@cases
def test_results_are_those_of_gathered_masks(backend: Backend, case: tuple, poisoned: None) -> None:
    for dtype in backend.dtypes[:1] if INTERPRET else (*backend.dtypes, torch.float64):
        masks, index, options = draw(case, backend, dtype)
        gathered = reference.on_grid(masks, index)
        for op in (kernels.upsample_argmax, kernels.upsample_softmax):
            assert torch.equal(op(masks, index=index, **options), op(gathered, **options))
        for reduction, smoothing in (("mean", 0.0), ("none", 0.1)):
            options = loss_options(case, backend, reduction) | {"label_smoothing": smoothing}
            found = kernels.upsample_cross_entropy(masks, index=index, **options)
            assert torch.equal(found, kernels.upsample_cross_entropy(gathered, **options))


def test_groups_whose_first_and_last_lie_as_far_apart_as_neighbours(backend: Backend) -> None:
    masks, index = torch.randn(1, 3, 4, device=backend.device), torch.tensor([[[0, 3, 1, 3]]], device=backend.device)
    for op in (kernels.upsample_argmax, kernels.upsample_softmax):
        assert torch.equal(op(masks, (5, 12), index=index), op(reference.on_grid(masks, index), (5, 12)))
    target = torch.randint(0, 3, (1, 5, 12), device=backend.device)
    found = kernels.upsample_cross_entropy(masks, target, index=index)
    assert torch.equal(found, kernels.upsample_cross_entropy(reference.on_grid(masks, index), target))


@cases
def test_gradients_of_groups(backend: Backend, case: tuple) -> None:
    for dtype in backend.dtypes[:1] if INTERPRET else backend.dtypes:  # the interpreter takes a second a case
        masks, index, options = draw(case, backend, dtype)
        grad = torch.randn(*masks.shape[:2], *(options["crop"] or options["size"]), device=backend.device)
        options["index"] = index
        assert_op_as_accurate(kernels.upsample_softmax, reference.upsample_softmax, [masks], grad, **options)
        for reduction in ("sum", "none"):
            options = loss_options(case, backend, reduction) | {"index": index}
            grad = torch.rand(options["target"].shape, device=backend.device) if reduction == "none" else None
            assert_op_as_accurate(
                kernels.upsample_cross_entropy, reference.upsample_cross_entropy, [masks], grad, **options
            )


def test_weights_and_smoothing_in_float64(backend: Backend) -> None:
    for reduction in ("mean", "none"):
        masks, index, _ = draw(CASES[0], backend, torch.float64)
        options = loss_options(CASES[0], backend, reduction) | {"index": index, "label_smoothing": 0.2}
        options["weight"] = torch.rand(7, device=backend.device, dtype=torch.float64)
        grad = torch.rand(options["target"].shape, device=backend.device) if reduction == "none" else None
        assert_op_equals(kernels.upsample_cross_entropy, reference.upsample_cross_entropy, [masks], grad, **options)


def test_a_group_for_each_patch_is_no_group(backend: Backend) -> None:
    """Results and gradients are those without an index, bit for bit."""
    plain = backend.masks(6, 3, 2)
    masks, index = plain.flatten(2), torch.arange(6, device=backend.device).view(1, 3, 2).expand(2, -1, -1)
    target = torch.randint(0, 6, (2, 7, 6), device=backend.device)
    ops: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (kernels.upsample_softmax, {"size": (7, 6)}),
        (kernels.upsample_cross_entropy, {"target": target}),
        (kernels.upsample_cross_entropy, {"target": target, "reduction": "none"}),
    ]
    for op, options in ops:
        grad = torch.randn_like(op(plain, **options))
        expected = with_gradients(op, [plain], grad, **options)
        found = with_gradients(op, [masks], grad, index=index, **options)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1].flatten(2))
    size = (7, 6)
    assert torch.equal(kernels.upsample_argmax(masks, size, index=index), kernels.upsample_argmax(plain, size))


def test_any_strides_and_groups_that_no_patch_has(backend: Backend) -> None:
    masks = torch.randn(2, 9, 14, device=backend.device)[:, ::2, ::2]  # (2, 5, 7)
    index = torch.randint(0, 5, (2, 6, 8), device=backend.device)[:, ::2, ::2]
    whole = masks.contiguous()
    masks[..., 5:] = torch.nan
    target = torch.randint(0, 5, (2, 12, 16), device=backend.device)
    for one, of_one in ((masks, index), (masks[:1].expand(2, -1, -1), index[:1, :1].expand(2, 3, -1))):
        expected = whole if one is masks else whole[:1].expand(2, -1, -1)
        for op in (kernels.upsample_argmax, kernels.upsample_softmax):
            assert torch.equal(op(one, (12, 16), index=of_one), op(expected, (12, 16), index=of_one))
        found, grad = with_gradients(kernels.upsample_cross_entropy, [one], None, target=target, index=of_one)
        assert torch.equal(found, kernels.upsample_cross_entropy(expected, target, index=of_one))
        assert not grad[..., 5:].any()


def test_non_finite_scores(backend: Backend) -> None:
    for value in (torch.nan, torch.inf):
        masks, index, options = draw(CASES[1], backend)
        masks[0, 3, 2] = value
        expected = kernels.upsample_argmax(reference.on_grid(masks, index), **options)
        assert torch.equal(kernels.upsample_argmax(masks, index=index, **options), expected)


def test_empty_batch(backend: Backend) -> None:
    masks, index, options = draw((0, 3, (2, 2), 3, (4, 5), None, False), backend)
    masks.requires_grad_()
    assert kernels.upsample_argmax(masks, index=index, **options).shape == (0, 4, 5)
    probabilities = kernels.upsample_softmax(masks, index=index, **options)
    assert torch.autograd.grad(probabilities.sum(), masks)[0].shape == (0, 3, 3)
    target = torch.zeros(0, 4, 5, dtype=torch.int64, device=backend.device)
    loss = kernels.upsample_cross_entropy(masks, target, reduction="sum", index=index)
    assert torch.autograd.grad(loss, masks)[0].shape == (0, 3, 3)


@pytest.mark.parametrize("count", [1, 2])
def test_lattices(backend: Backend, count: int) -> None:
    for classes, side in ((3, 17), (40, 5)):
        scores, *tables = lattices(count, classes, side, side + 1, backend.device)
        index = torch.randint(0, len(scores) // 2 + 1, (len(scores),), device=backend.device)
        groups = torch.full((len(scores) // 2 + 3, classes), torch.nan, device=backend.device)
        groups[:-2] = scores[: len(groups) - 2]
        for op in (kernels.lattice_argmax, kernels.lattice_softmax):
            found = op(groups, *tables, index=index)
            assert torch.equal(found, op(groups[index], *tables))
        if count > 1:
            expected = reference.lattice_softmax(groups, *tables, index)
            torch.testing.assert_close(kernels.lattice_softmax(groups, *tables, index), expected)


def test_errors_name_the_argument() -> None:
    masks, index = torch.zeros(2, 3, 4), torch.zeros(2, 5, 5, dtype=torch.int64)
    wrong = [
        (masks, None, ValueError, r"masks must be \(B, K, h, w\), got \(2, 3, 4\); .* need an index"),
        (masks[..., None], index, ValueError, r"groups \(B, K, M\) where an index is given, got \(2, 3, 4, 1\)"),
        (masks, index[0], ValueError, r"index must be \(2, h, w\) for masks \(2, 3, 4\), got \(5, 5\)"),
        (masks, index[:1], ValueError, r"index must be \(2, h, w\)"),
        (masks, index[:, :0], ValueError, r"index must be \(2, h, w\)"),
        (masks, index.int(), TypeError, r"index must be int64, got torch\.int32"),
        (masks, index.to("meta"), ValueError, "all arguments must be on one device, got masks on cpu, index on meta"),
    ]
    for masks_given, index_given, error, message in wrong:
        for op in (kernels.upsample_argmax, kernels.upsample_softmax):
            with pytest.raises(error, match=message):
                op(masks_given, (8, 8), index=index_given)
        with pytest.raises(error, match=message):
            kernels.upsample_cross_entropy(masks_given, torch.zeros(2, 8, 8).long(), index=index_given)
    arguments = lattices(1, 3, 4, 4)
    for points, error, message in (
        (torch.zeros(9, dtype=torch.int32), TypeError, "index must be int64"),
        (torch.zeros(9, 1).long(), ValueError, r"index must be \(N,\), not empty and contiguous, got \(9, 1\)"),
        (torch.zeros(18).long()[::2], ValueError, "contiguous"),
    ):
        for op in (kernels.lattice_argmax, kernels.lattice_softmax):
            with pytest.raises(error, match=message):
                op(*arguments, index=points)


@pytest.mark.skipif(INTERPRET, reason="the kernels of a GPU do not look at the values of an index")
@pytest.mark.parametrize("value", [-1, 4])
def test_an_index_out_of_range_on_the_cpu(value: int) -> None:
    masks, index = torch.zeros(1, 3, 4), torch.tensor([[[0, 1], [value, 2]]])
    for op in (kernels.upsample_argmax, kernels.upsample_softmax):
        with pytest.raises(IndexError, match=rf"index must be in \[0, 4\), got {value}"):
            op(masks, (8, 8), index=index)
    with pytest.raises(IndexError, match=rf"got {value}"):
        kernels.upsample_cross_entropy(masks, torch.zeros(1, 8, 8).long(), index=index)
    for count, op in itertools.product((1, 2), (kernels.lattice_argmax, kernels.lattice_softmax)):
        _, *tables = lattices(count, 3, 4, 4)
        with pytest.raises(IndexError, match=rf"got {value}"):
            op(torch.zeros(4, 3), *tables, index=torch.full((40,), value))
