"""upsample_cross_entropy against float64 interpolate + cross_entropy: values and gradients, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from support.accuracy import assert_op_as_accurate, assert_op_equals, with_gradients

from .conftest import Backend

SIZE, CROP = (7, 9), (6, 8)


def targets(masks: Tensor, size: tuple[int, int], ignore_index: int = 255) -> Tensor:
    target = torch.randint(0, masks.shape[1], (masks.shape[0], *size), device=masks.device)
    return target.masked_fill(torch.rand(target.shape, device=masks.device) < 0.2, ignore_index)


def run(masks: Tensor, target: Tensor, grad_loss: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """Loss and gradient of the masks."""
    return with_gradients(kernels.upsample_cross_entropy, [masks], grad_loss, target=target, **options)


def pytorch(masks: Tensor, weight: Tensor | None = None, **options) -> Tensor:
    return reference.upsample_cross_entropy(masks, weight=None if weight is None else weight.to(masks.dtype), **options)


def check(masks: Tensor, target: Tensor, **options) -> None:
    """Loss and gradient are as accurate as PyTorch's in the dtype of the masks."""
    grad_loss = torch.rand(target.shape, device=masks.device) if options.get("reduction") == "none" else None
    options["target"] = target
    loss, grad = assert_op_as_accurate(kernels.upsample_cross_entropy, pytorch, [masks], grad_loss, **options)
    assert loss.dtype == (torch.float64 if masks.dtype == torch.float64 else torch.float32)
    assert grad.dtype == masks.dtype


@pytest.mark.parametrize(
    ("reduction", "smoothing", "weighted", "align_corners"),
    [
        *itertools.product(("mean", "none"), (0.0, 0.1), (False, True), (False,)),
        ("sum", 0.0, False, True),
        ("sum", 1.0, True, True),
        ("mean", 0.0, False, True),
    ],
)
def test_every_option(backend: Backend, reduction: str, smoothing: float, weighted: bool, align_corners: bool) -> None:
    masks = backend.masks(19)
    weight = torch.rand(19, device=backend.device).masked_fill(torch.arange(19, device=backend.device) % 5 == 0, 0)
    check(
        masks,
        targets(masks, CROP),
        size=SIZE,
        weight=weight if weighted else None,
        label_smoothing=smoothing,
        reduction=reduction,
        align_corners=align_corners,
    )


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    masks, weight = torch.randn(2, 19, 2, 3), torch.rand(19)
    for reduction in ("mean", "none"):
        check(masks, targets(masks, CROP), size=SIZE, weight=weight, label_smoothing=0.1, reduction=reduction)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    masks, index = torch.randn(2, 21, 7, 9), torch.randint(0, 30, (2, 7, 9))
    target, groups = targets(masks, (70, 80)), torch.randn(2, 21, 30)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append((*run(masks, target), *run(groups, target, index=index)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_every_dtype(backend: Backend) -> None:
    for dtype in (*backend.dtypes, torch.float64):
        masks = backend.masks(7, b=1).to(dtype)
        check(masks, targets(masks, SIZE))
        check(masks, targets(masks, SIZE), reduction="none", label_smoothing=0.2)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(backend: Backend, data: st.DataObject) -> None:
    side = st.integers(1, 4)
    b, k, h, w = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 18), side, side), "masks")
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)), "size")
    crop = tuple(data.draw(st.integers(1, full), "crop") for full in size)
    masks = backend.masks(k, h, w, b)
    check(
        masks,
        targets(masks, crop),
        size=size,
        align_corners=data.draw(st.booleans(), "align_corners"),
        reduction=data.draw(st.sampled_from(("mean", "sum", "none")), "reduction"),
    )


def test_many_classes(backend: Backend) -> None:
    masks = backend.masks(4099, 1, 1, 1)
    check(masks, targets(masks, (1, 2), -100), ignore_index=-100, label_smoothing=0.1)


def test_cells_larger_than_a_tile(backend: Backend) -> None:
    masks = backend.masks(3, 1, 2, 1)
    check(masks, targets(masks, (20, 35)))


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32"])
def test_strides_and_target_types(backend: Backend, kind: str) -> None:
    masks = torch.randn(3, 4, 5, 6, device=backend.device)[..., ::2].permute(2, 0, 3, 1)[:2]  # (2, 3, 3, 4)
    target = torch.randint(0, 3, (5, 6, 2), device=backend.device).to(getattr(torch, kind)).permute(2, 0, 1)
    target[:, ::3] = 255
    check(masks, target)
    check(masks[:1].expand(2, -1, -1, -1), target, reduction="none")


def test_ignore_index_that_the_type_of_the_target_cannot_hold(backend: Backend) -> None:
    masks = backend.masks(300, 2, 2, 1)
    target = torch.full((1, 3, 3), 156, dtype=torch.uint8, device=backend.device)  # 156 is -100 modulo 256
    check(masks, target, ignore_index=-100)


def test_ignore_index_may_be_a_class(backend: Backend) -> None:
    masks = backend.masks(4)
    check(masks, targets(masks, SIZE, 2), ignore_index=2, weight=torch.rand(8, device=backend.device)[::2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_pixel_counts(backend: Backend, reduction: str, smoothing: float) -> None:
    masks = backend.masks(3)
    first = torch.zeros(2, *SIZE, dtype=torch.int64, device=backend.device)
    cases = [(first + 255, None), (targets(masks, SIZE), torch.zeros(3, device=backend.device))]
    if reduction == "mean":  # a divisor of 0, and with smoothing a sum that is not
        cases.append((first, torch.arange(3.0, device=backend.device)))
    for target, weight in cases:
        options = {"target": target, "reduction": reduction, "label_smoothing": smoothing, "weight": weight}
        grad_loss = torch.ones(target.shape, device=backend.device) if reduction == "none" else None
        assert_op_equals(kernels.upsample_cross_entropy, pytorch, [masks], grad_loss, **options)


def test_empty_batch(backend: Backend) -> None:
    masks = backend.masks(3, b=0)
    loss, grad = run(masks, targets(masks, SIZE))
    assert loss.isnan()
    assert grad.shape == masks.shape
    assert run(masks, targets(masks, SIZE), reduction="sum")[0] == 0


def test_extreme_values(backend: Backend) -> None:
    masks = backend.masks(5)
    spread = backend.masks(5, b=8)  # enough pixels that luck in rounding 1e4 evens out
    spread[:, 0, 0, 0], spread[:, 0, 1, 1], spread[:, 1, 1, 2] = 1e4, -1e4, 1e4
    signs = torch.sign(torch.randn_like(masks)) * 1e4
    for extreme in (spread, signs, masks + 1e4, masks * 1e-30, masks * 40):
        check(extreme, targets(extreme, (8, 12)), reduction="none")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_masks(backend: Backend, value: float) -> None:
    one, whole = backend.masks(4, 3, 4, 1), backend.masks(4, 3, 4, 1)
    one[0, 1, 1, 2] = value
    whole[:, 2] = value
    # Weights of exactly 0: at the near border, and at the centres where corners are aligned.
    for masks, (size, align_corners) in itertools.product((one, whole), (((6, 8), False), ((5, 7), True))):
        options = {"target": targets(masks, size), "reduction": "none", "align_corners": align_corners}
        grad_loss = torch.rand(1, *size, device=backend.device)
        assert_op_equals(kernels.upsample_cross_entropy, pytorch, [masks], grad_loss, **options)


@pytest.mark.parametrize("classes", [5, 8])  # not a multiple of a block of classes, and one
def test_no_class_is_finite_at_a_pixel(backend: Backend, classes: int) -> None:
    masks = backend.masks(classes, 2, 2, 1)
    masks[..., 1, 1] = -float("inf")
    target = torch.zeros(1, 8, 8, dtype=torch.int64, device=backend.device)
    for reduction in ("mean", "none"):
        grad_loss = torch.ones(target.shape, device=backend.device) if reduction == "none" else None
        assert_op_equals(
            kernels.upsample_cross_entropy, pytorch, [masks], grad_loss, target=target, reduction=reduction
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_without_a_change_of_size_nothing_reaches_a_neighbour(backend: Backend, value: float) -> None:
    masks = backend.masks(5, 3, 3, 1)
    masks[0, 1, 1, 1] = value
    target = torch.zeros(1, 3, 3, dtype=torch.int64, device=backend.device)

    def on_a_cpu(masks: Tensor, target: Tensor, reduction: str) -> Tensor:
        """PyTorch's CUDA kernel copies where the size is the same, and makes no NaN of 0 * inf."""
        return pytorch(masks.cpu(), target=target.cpu(), reduction=reduction).to(masks.device)

    assert_op_equals(kernels.upsample_cross_entropy, on_a_cpu, [masks], target=target, reduction="sum")
    _, grad = run(masks, target)
    assert grad[0, :, torch.arange(3) != 1].isfinite().all()


@pytest.mark.parametrize("value", [-1, 4, 254])
def test_target_that_is_no_class(backend: Backend, value: int) -> None:
    masks = backend.masks(4)
    target = targets(masks, SIZE)
    target[1, 3, 4] = value
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=rf"\[0, 4\) or ignore_index 255, got {value}"):
            kernels.upsample_cross_entropy(masks, target)
        return
    for reduction in ("mean", "sum"):
        loss, grad = run(masks, target, reduction=reduction)
        assert loss.isnan()
        assert grad[1].isnan().any()
    per_pixel = kernels.upsample_cross_entropy(masks, target, reduction="none")
    assert per_pixel.isnan().nonzero().tolist() == [[1, 3, 4]]


def test_autocast_changes_nothing(backend: Backend) -> None:
    masks = backend.masks(7)
    target = targets(masks, SIZE)
    plain = run(masks, target, label_smoothing=0.1)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        cast = run(masks, target, label_smoothing=0.1)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_gradient_of_the_loss_scales(backend: Backend) -> None:
    masks = backend.masks(3)
    target = targets(masks, SIZE)
    _, grad = run(masks, target)
    _, scaled = run(masks, target, torch.tensor(3.0, device=backend.device))
    torch.testing.assert_close(scaled, 3 * grad)


@pytest.mark.parametrize("strides", [((1 << 31) + 64, 1, 12, 3), (64, (1 << 30) + 64, 12, 3)])
def test_offsets_beyond_32_bits(backend: Backend, strides: tuple[int, ...]) -> None:
    """The two images, or the first and the last class, are 2^31 elements apart."""
    values = torch.randn(2, 3, 2, 2, device=backend.device).half()
    masks = backend.sparse_memory((1 << 31) + 512).as_strided((2, 3, 2, 2), strides).copy_(values)
    target = targets(masks, (4, 4))
    for ours, expected in zip(run(masks, target), run(values, target), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(1, 6, 8).long()}, ValueError, r"share B and not be empty, got \(1, 6, 8\) and \(2, 3,"),
        ({"target": torch.zeros(2, 6, 8)}, TypeError, "target must be int64, int32, int16 or uint8, got torch.float32"),
        ({"target": torch.zeros(2, 8, 9).long()}, ValueError, r"target must be .* at most size \[7, 9\], got \[8, 9\]"),
        ({"target": torch.zeros(2, 6, 8, device="meta").long()}, ValueError, "got masks on cpu, target on meta"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "target on cpu, weight on meta"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    options = {"target": torch.zeros(2, 6, 8).long(), "size": SIZE} | change
    with pytest.raises(error, match=message):
        kernels.upsample_cross_entropy(torch.zeros(2, 3, 2, 3), **options)
