"""mask_scores against float64, forward and every gradient, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from support.accuracy import assert_as_accurate, assert_op_as_accurate, with_gradients

from .conftest import Backend


def inputs(b: int, n: int, k: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    tensors = [torch.randn(b, n, dim), torch.randn(b, k, dim), torch.randn(k) + 1, torch.randn(k)]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def check(tensors: list[Tensor]) -> None:
    grad = torch.randn(*tensors[0].shape[:2], tensors[1].shape[1]).to(tensors[0].device, tensors[0].dtype)
    assert_op_as_accurate(kernels.mask_scores, reference.mask_scores, tensors, grad)


@pytest.mark.parametrize("shape", [(2, 70, 19, 48), (1, 1, 1, 16), (1, 33, 150, 24), (1, 5, 300, 20), (2, 3, 2, 7)])
def test_as_accurate_as_pytorch(backend: Backend, shape: tuple[int, ...]) -> None:
    for dtype in backend.dtypes:
        check(inputs(*shape, dtype, backend.device))


@pytest.mark.parametrize("norm", [1e-3, 1e-2, 1.0, 100.0])
def test_norms_of_embeddings(backend: Backend, norm: float) -> None:
    """Gradients of norm 1e-3 are thousands, which float16 holds; their products on the way are millions.

    They are held to the rounded oracle, because PyTorch's own overflow.
    """
    for dtype in backend.dtypes:
        tensors = [t.detach() for t in inputs(2, 33, 19, 64, dtype, backend.device)]
        tensors[:2] = [F.normalize(t.float(), dim=-1).mul(norm).to(dtype) for t in tensors[:2]]
        grad = torch.randn(2, 33, 19).to(backend.device, dtype)
        ours = with_gradients(kernels.mask_scores, tensors, grad)
        oracle = with_gradients(reference.mask_scores, [t.double() for t in tensors], grad)
        for result, expected in zip(ours, oracle, strict=True):
            assert_as_accurate(result, expected.to(dtype), expected)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(3, 40), st.integers(8, 40))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(backend: Backend, b: int, n: int, k: int, dim: int) -> None:
    torch.manual_seed(0)  # makes every example independent of the others
    check(inputs(b, n, k, dim, torch.float32, backend.device))


def test_strided_inputs(backend: Backend) -> None:
    tensors = inputs(2, 20, 6, 32, torch.float32, backend.device)
    whole = torch.randn(2, 26, 64, device=backend.device)
    tensors[0] = whole[:, :-6, ::2].detach().requires_grad_()
    tensors[1] = whole[:, -6:, :32].detach().requires_grad_()
    check(tensors)


def test_tiny_spread_keeps_its_variance(backend: Backend) -> None:
    """Nearly equal scores near 1: the variance must not come from a difference of squares."""
    base = torch.randn(1, 1, 32)
    tensors = inputs(1, 9, 300, 32, torch.float32, backend.device)
    tensors[0] = (base + 1e-2 * torch.randn(1, 9, 32)).to(backend.device).requires_grad_()
    tensors[1] = (base + 1e-2 * torch.randn(1, 300, 32)).to(backend.device).requires_grad_()
    check(tensors)


@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 0, 3, 8)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape, torch.float32, backend.device)
    out = kernels.mask_scores(*tensors)
    assert out.shape == (shape[0], shape[1], shape[2])
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors)
    assert not tensors[2].grad.any()


def test_zero_vectors_are_nan_where_the_reference_is(backend: Backend) -> None:
    tensors = [t.detach() for t in inputs(2, 8, 4, 16, torch.float32, backend.device)]
    tensors[0][0, 3] = 0
    tensors[1][1, 2] = 0
    ours, expected = kernels.mask_scores(*tensors), reference.mask_scores(*tensors)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours[0, 3].isnan().all()
    assert ours[1].isnan().all()


def test_gradients_of_zero_vectors_are_nan_where_the_reference_is(backend: Backend) -> None:
    for dtype in backend.dtypes:
        tensors = [t.detach() for t in inputs(2, 8, 4, 16, dtype, backend.device)]
        tensors[0][0, 3] = 0
        grad = torch.randn(2, 8, 4).to(backend.device, dtype)
        ours = with_gradients(kernels.mask_scores, tensors, grad)
        oracle = with_gradients(reference.mask_scores, [t.double() for t in tensors], grad)
        assert not oracle[1][0, 2].isnan().any()
        for result, expected in zip(ours, oracle, strict=True):
            assert torch.equal(result.isnan(), expected.isnan())


def test_a_float32_norm_of_low_precision_embeddings_is_not_rounded(backend: Backend) -> None:
    """Autocast produces such inputs: low-precision matrix products and a float32 LayerNorm."""
    patches, classes, weight, bias = inputs(1, 20, 19, 32, torch.float16, backend.device)
    weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    out = kernels.mask_scores(patches, classes, weight, bias)
    assert out.dtype == torch.float32
    oracle = reference.mask_scores(*(t.detach().double() for t in (patches, classes, weight, bias)))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert [t.grad.dtype for t in (patches, weight)] == [torch.float16, torch.float32]
    if backend.device == "cpu":
        with torch.autocast("cpu", dtype=torch.float16):
            assert kernels.mask_scores(patches, classes, weight, bias).dtype == torch.float32


def test_errors_name_the_arguments() -> None:
    patches, classes, weight, bias = inputs(2, 4, 3, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"must share B and D, got \(2, 4, 8\) and \(1, 3, 8\)"):
        kernels.mask_scores(patches, classes[:1], weight, bias)
    with pytest.raises(TypeError, match="must share a dtype"):
        kernels.mask_scores(patches, classes.half(), weight, bias)
    with pytest.raises(ValueError, match=r"weight and bias must be \(3,\)"):
        kernels.mask_scores(patches, classes, weight[:2], bias)
