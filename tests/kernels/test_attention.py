"""Attention against a float64 oracle, held to the error of PyTorch's own in the same dtype."""

from __future__ import annotations

import importlib
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from segmenter_fast.kernels import attention, reference
from support.accuracy import assert_as_accurate, with_gradients

from .conftest import Backend

ops = torch.ops.segmenter_fast


def sdpa(qkv: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, scale = (q * scale, 1.0) if scale is not None and scale <= 0 else (q, scale)  # cuDNN makes NaN of it
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def assert_attention(qkv: Tensor, grad_out: Tensor, scale: float | None = None, ulps: float = 4.0) -> None:
    """Output, dq, dk and dv of the public op are as accurate as those of ``scaled_dot_product_attention``."""
    out, grad = with_gradients(attention, [qkv], grad_out, scale=scale)
    assert out.is_contiguous()
    assert grad.shape == qkv.shape
    if qkv.numel() == 0:
        return
    peer_out, peer_grad = with_gradients(sdpa, [qkv], grad_out, scale=scale)
    oracle_out, oracle_grad = with_gradients(reference.attention, [qkv.double()], grad_out, scale=scale)
    assert_as_accurate(out, peer_out, oracle_out, ulps=ulps)
    if qkv.shape[1] == 1:  # dq and dk of a single key are zero: their floor is that of the whole gradient
        assert_as_accurate(grad, peer_grad, oracle_grad, ulps=ulps)
        return
    for index in range(3):
        assert_as_accurate(grad[:, :, index], peer_grad[:, :, index], oracle_grad[:, :, index], ulps=ulps)


def inputs(backend: Backend, b: int, n: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    qkv = torch.randn(b, n, 3, heads, dim, device=backend.device, dtype=dtype)
    return qkv, torch.randn(b, n, heads, dim, device=backend.device, dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 129, 257])
def test_lengths(backend: Backend, n: int, poisoned: None) -> None:
    for dtype in backend.dtypes:
        assert_attention(*inputs(backend, 1, n, 2, 64, dtype))


@pytest.mark.parametrize("dim", [16, 32, 80, 96, 128])
def test_head_sizes(backend: Backend, dim: int, poisoned: None) -> None:
    for dtype in backend.dtypes:
        assert_attention(*inputs(backend, 2, 67, 1, dim, dtype))


def ulps_of_scores(qkv: Tensor, scale: float | None) -> float:
    """4 ulps and the cost of rounding scores in float32: each weight is off by as many of its ulps as scores are large.

    PyTorch is luckier at times, depending on the processor's order of summation.
    """
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    largest = scores.abs().max().item() if scores.numel() else 0.0
    return 4 + largest * torch.finfo(torch.float32).eps / torch.finfo(qkv.dtype).eps


@given(
    b=st.integers(0, 5),
    n=st.integers(1, 100),
    heads=st.integers(0, 5),
    dim=st.sampled_from([16, 32, 64]),
    scale=st.sampled_from([None, 0.0, 1.0, -0.25]),
    index=st.integers(0, 2),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(backend: Backend, b: int, n: int, heads: int, dim: int, scale: float | None, index: int) -> None:
    torch.manual_seed(0)  # makes every example independent of the others
    dtype = backend.dtypes[index % len(backend.dtypes)]
    qkv, grad_out = inputs(backend, b, n, heads, dim, dtype)
    assert_attention(qkv, grad_out, scale, ulps_of_scores(qkv, scale))


def test_extreme_logits(backend: Backend) -> None:
    """Scores of +-1e4, whose float32 rounding changes each weight by 1e4 of its ulps."""
    for dtype in backend.dtypes:
        qkv, grad_out = inputs(backend, 2, 65, 4, 32, dtype)
        q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
        scale = 1e4 / (q @ k.mT).abs().max().item()
        assert_attention(qkv, grad_out, scale, ulps_of_scores(qkv, scale))


def test_one_key_dominates(backend: Backend) -> None:
    for dtype in backend.dtypes:
        qkv, grad_out = inputs(backend, 1, 65, 2, 32, dtype)
        qkv[:, :, 0] = qkv[:, :, 0].abs()
        qkv[:, 64, 1] = 20.0  # the last key, in the ragged tail
        assert_attention(qkv, grad_out)
        assert_attention(qkv.flip(1), grad_out)


@pytest.mark.parametrize("keys", [3, 64, slice(None)], ids=["in a full block", "in the tail", "all"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_and_missing_scores(
    backend: Backend, keys: int | slice, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are NaN where PyTorch's are: with a score of inf or NaN, not of -inf; zeros if all scores are -inf.

    PyTorch's are those of its formulation in float32: its fused CPU kernel, which is also ours, loses some NaN.
    """
    if backend.name == "interpret":  # as PTX does it: the larger of a number and NaN is the number
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        monkeypatch.setattr(builder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
    dtype = backend.dtypes[0 if backend.name == "cpu" else -1]
    qkv, grad_out = inputs(backend, 1, 65, 1, 16, dtype)
    qkv[:, :, 0, :, 0] = qkv[:, :, 0, :, 0].abs() + 1
    if value == math.inf:
        qkv[:, 5, 0, 0, 0] *= -1  # the one query whose scores are -inf
    qkv[:, keys, 1, 0, 0] = value
    ours = with_gradients(attention, [qkv], grad_out)
    with sdpa_kernel(SDPBackend.MATH):
        peers = with_gradients(sdpa, [qkv.float().cpu()], grad_out.float().cpu())
    for result, peer in zip(ours[: 1 if backend.name == "cpu" else 2], peers, strict=False):
        assert_as_accurate(result.cpu(), peer.to(dtype), peer.double(), ulps=16)


def test_equal_keys(backend: Backend) -> None:
    for dtype in backend.dtypes:
        qkv, grad_out = inputs(backend, 2, 70, 1, 32, dtype)
        qkv[:, :, 1] = qkv[:, :1, 1]
        assert_attention(qkv, grad_out)


def test_strided_qkv(backend: Backend) -> None:
    """A slice of a larger buffer with odd strides; the gradient is zero outside the slice."""
    dtype = backend.dtypes[-1]
    whole = torch.randn(3, 41, 3, 4, 67, device=backend.device, dtype=dtype)
    part = whole[1:, 2:37, :, ::2, 3:35]
    assert_attention(part, torch.randn_like(part[:, :, 0]))
    qkv = whole.requires_grad_()
    attention(qkv[1:, 2:37, :, ::2, 3:35]).sum().backward()
    assert whole.grad is not None
    outside = whole.grad.clone()
    outside[1:, 2:37, :, ::2, 3:35] = 0
    assert not outside.any()


def test_strided_grad_out(backend: Backend) -> None:
    qkv, grad_out = inputs(backend, 2, 20, 3, 16, torch.float32)
    expected = with_gradients(attention, [qkv], grad_out)[1]
    for strided in (
        grad_out.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),  # last stride not 1
        grad_out.transpose(1, 2).contiguous().transpose(1, 2),
        grad_out.repeat_interleave(2, 1)[:, ::2],
    ):
        assert torch.equal(with_gradients(attention, [qkv], strided)[1], expected)
    ones = torch.ones_like(grad_out)
    (_, expected), (_, expanded) = (
        with_gradients(attention, [qkv], grad) for grad in (ones, ones[:1, :1, :1, :1].expand_as(ones))
    )
    assert torch.equal(expanded, expected)


def test_lse_only_for_a_gradient(backend: Backend) -> None:
    qkv, _ = inputs(backend, 2, 33, 2, 16, torch.float32)
    out, lse = ops.attention(qkv, 0.25, True)
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    unit = 1.0 if backend.name == "cpu" else math.log(2)
    torch.testing.assert_close(lse.double() * unit, (q @ k.mT * 0.25).logsumexp(-1), rtol=1e-6, atol=1e-6)
    without, empty = ops.attention(qkv, 0.25, False)
    assert torch.equal(out, without)
    assert empty.numel() == 0


def test_addresses_beyond_32_bits(backend: Backend) -> None:
    """Products of an index and a stride that is itself below 2^31, and token strides beyond it."""
    storage = backend.sparse_memory(2**31 + 2**20)
    for b, n, strides in (
        (3, 2, (2**30, 96, 32, 16, 1)),
        (1, 2, (96, 2**31, 32, 16, 1)),
        (1, 3, (96, 2**30, 32, 16, 1)),
    ):
        far = storage.as_strided((b, n, 3, 2, 16), strides)
        near, grad_out = inputs(backend, b, n, 2, 16, torch.float16)
        far.copy_(near)
        grad_far = storage.as_strided((b, n, 2, 16), (*strides[:2], 16, 1), 2**19).copy_(grad_out)
        ours, expected = with_gradients(attention, [far], grad_far), with_gradients(attention, [near], grad_out)
        assert all(torch.equal(value, expected_value) for value, expected_value in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [577, 1025, 4097, 16385])
def test_long_sequences(n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_attention(*inputs(Backend("gpu", "cuda", ()), 1, n, 1, 64, dtype))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(backend: Backend, reentrant: bool) -> None:
    qkv, grad_out = inputs(backend, 2, 17, 2, 16, torch.float32)
    expected = with_gradients(attention, [qkv], grad_out)[1]
    x = qkv.clone().requires_grad_()
    checkpoint(attention, x, use_reentrant=reentrant).backward(grad_out)
    assert torch.equal(x.grad, expected)


def test_autocast(backend: Backend) -> None:
    """The dtype of the result and of the gradient is that of scaled_dot_product_attention."""
    dtype = backend.dtypes[1]
    for given_dtype in (torch.float32, dtype):
        x = inputs(backend, 1, 17, 2, 16, given_dtype)[0].requires_grad_()
        with torch.autocast(backend.device, dtype):
            out = attention(x)
            peer = sdpa(x)
        assert out.dtype == peer.dtype == dtype
        assert torch.autograd.grad(out, x, torch.ones_like(out))[0].dtype == given_dtype
        torch.testing.assert_close(out, attention(x.to(dtype)))


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap(backend: Backend, in_dim: int) -> None:
    batched = torch.randn(2, 2, 9, 3, 2, 16, device=backend.device).requires_grad_()
    torch.testing.assert_close(
        torch.func.vmap(attention, in_dims=in_dim)(batched),
        torch.func.vmap(reference.attention, in_dims=in_dim)(batched),
    )
    got, expected = (
        torch.autograd.grad(torch.func.vmap(function, in_dims=in_dim)(batched).square().sum(), batched)[0]
        for function in (attention, reference.attention)
    )
    torch.testing.assert_close(got, expected)


def test_vmap_of_the_gradient(backend: Backend) -> None:
    """Batched gradients of one output: only ``grad_out`` carries the vmapped dimension."""
    qkv = torch.randn(1, 5, 3, 2, 16, device=backend.device).requires_grad_()
    grads = torch.randn(3, 1, 5, 2, 16, device=backend.device)
    got, expected = (
        torch.autograd.grad(function(qkv), qkv, grads, is_grads_batched=True)[0]
        for function in (attention, reference.attention)
    )
    torch.testing.assert_close(got, expected)


def test_errors_name_the_argument(backend: Backend) -> None:
    device = backend.device
    for shape in ((2, 5, 48), (2, 5, 2, 1, 16), (2, 5, 3, 1, 0)):
        with pytest.raises(ValueError, match=re.escape(f"qkv must be (B, N, 3, H, D), D at least 1, got {shape}")):
            attention(torch.zeros(shape, device=device))
    with pytest.raises(ValueError, match="last stride of 1"):
        attention(torch.zeros(2, 5, 3, 1, 32, device=device)[..., ::2])
    with pytest.raises(TypeError, match="qkv must be float32"):
        attention(torch.zeros(2, 5, 3, 1, 16, device=device, dtype=torch.int32))


def test_other_head_sizes_and_float64(backend: Backend) -> None:
    """PyTorch's kernel for the CPU takes all; Triton raises an error that lists what it takes."""
    if backend.name == "cpu":
        assert_attention(*inputs(backend, 1, 17, 2, 48, torch.float64))
        return
    with pytest.raises(ValueError, match=r"head sizes \(16, 32, 64, 80, 96, 128\), got 48"):
        attention(torch.zeros(2, 5, 3, 1, 48, device=backend.device))
    with pytest.raises(TypeError, match="float64"):
        attention(torch.zeros(2, 5, 3, 1, 16, device=backend.device, dtype=torch.float64))
