"""The C++ backward of attention by each set of instructions that it is compiled for, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from segmenter_fast.kernels.cpu import attention as cpu
from segmenter_fast.kernels.registry import statistics_dtype
from support.accuracy import assert_as_accurate

from .test_attention import ulps_of_scores

pytestmark = pytest.mark.usefixtures("instructions")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's backward is not what runs."""
    monkeypatch.setattr(cpu, "_flash_backward", None)


def plain(
    grad_out: Tensor,
    qkv: Tensor,
    scale: float,
    bias: Tensor | None,
    dtype: torch.dtype,
    saved: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient by plain formulas in ``dtype``, given output and log-sum-exp if they are ``saved``."""
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    grad_out = grad_out.to(dtype).transpose(1, 2)
    scores = (q @ k.mT * scale).to(statistics_dtype(dtype))
    if bias is not None:
        scores = scores + bias[:, None, None]
    lse = scores.logsumexp(-1) if saved is None else saved[1]
    lse = lse.nan_to_num(math.nan, math.nan, 0)  # softmax has NaN of infinite scores; every key may be left out
    weights = (scores - lse.unsqueeze(-1)).exp().to(dtype)
    out = weights @ v if saved is None else saved[0].transpose(1, 2)
    grad_scores = weights * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
    return torch.stack([grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad_out]).permute(1, 3, 0, 2, 4)


def gradient(grad_out: Tensor, qkv: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    out, lse = cpu.attention_forward(qkv, scale, True, bias)
    return cpu.attention_backward(grad_out, qkv, out, lse, scale, bias)


def assert_right(grad_out: Tensor, qkv: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    saved = cpu.attention_forward(qkv, scale, True, bias)
    grad = cpu.attention_backward(grad_out, qkv, *saved, scale, bias)
    assert grad.is_contiguous()
    oracle = plain(grad_out, qkv, scale, bias, torch.float64)
    saved[1].masked_fill_(saved[1] == math.inf, -math.inf)
    peer = plain(grad_out, qkv, scale, bias, qkv.dtype, saved)
    for index in range(3) if qkv.shape[1] > 1 else [2]:  # of a single key, dq and dk are zero
        grads = (values[:, :, index] for values in (grad, peer, oracle))
        assert_as_accurate(*grads, ulps=ulps_of_scores(qkv, scale))
    return grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "dim"),
    [(1, 64), (2, 17), (13, 16), (15, 128), (72, 96), (113, 1), (145, 80), (272, 64), (289, 20), (600, 33)],
)
def test_shapes(n: int, dim: int, dtype: torch.dtype, poisoned: None) -> None:
    """Lengths around those of tiles and blocks; heads of whole vectors and of parts of one."""
    qkv, grad_out = torch.randn(2, n, 3, 3, dim, dtype=dtype), torch.randn(2, n, 3, dim, dtype=dtype)
    assert_right(grad_out, qkv, dim**-0.5)
    bias = torch.randint(1, 9, (2, n)).float().log()
    bias[:, n // 2 + 1 :: 3] = -math.inf
    assert_right(grad_out, qkv, -0.3, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (7, 5)], ids=["heads in chunks", "whole heads"])
def test_threads_and_strides_change_nothing(batch: int, heads: int, dtype: torch.dtype) -> None:
    whole = torch.randn(batch, 640, 3, 2 * heads, 40, dtype=dtype)
    qkv = whole[:, 3:-2, :, ::2, 5:37]
    grad_out = torch.randn(batch, 1, heads, 32, dtype=dtype).expand(-1, 635, -1, -1)
    expected = assert_right(grad_out, qkv, 0.2)
    assert torch.equal(gradient(grad_out.contiguous(), qkv.contiguous(), 0.2), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(gradient(grad_out, qkv, 0.2), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys(dtype: torch.dtype) -> None:
    qkv, grad_out = torch.randn(2, 300, 3, 2, 16, dtype=dtype), torch.randn(2, 300, 2, 16, dtype=dtype)
    bias = torch.zeros(2, 300)
    bias[0] = bias[1, 1:] = -math.inf
    grad = assert_right(grad_out, qkv, 0.25, bias)
    assert not grad[0].any()
    assert not grad[1, 1:, 1:].any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("kind", "token"), [(0, 299), (1, 3), (1, 299), (2, 5)])
def test_infinities_and_nan(kind: int, token: int, value: float) -> None:
    """NaN where plain formulas have it: what stands for missing tokens in tiles adds nothing."""
    qkv, grad_out = torch.randn(1, 300, 3, 1, 16), torch.randn(1, 300, 1, 16)
    qkv[:, :, 0, :, 0] = qkv[:, :, 0, :, 0].abs() + 1
    qkv[:, token, kind, 0, 0] = value
    expected = plain(grad_out, qkv, 0.25, None, torch.float32)
    torch.testing.assert_close(gradient(grad_out, qkv, 0.25), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
