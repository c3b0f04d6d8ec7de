"""The C++ attention by each set of instructions that it is compiled for, against PyTorch's own in the same dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from segmenter_fast.kernels.cpu import attention as cpu
from support.accuracy import assert_as_accurate

from .test_attention import ulps_of_scores
from .test_attention_bias import sdpa

pytestmark = pytest.mark.usefixtures("instructions")


def assert_attention(qkv: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    assert cpu.runs_native(qkv.dtype)
    out, lse = cpu.attention_forward(qkv, scale, True, bias)
    bias = torch.zeros(qkv.shape[:2]) if bias is None else bias
    scaled, exact = qkv.clone(), qkv.double()
    scaled[:, :, 0] *= scale * qkv.shape[-1] ** 0.5
    exact[:, :, 0] *= scale * qkv.shape[-1] ** 0.5
    assert_as_accurate(out, sdpa(scaled, bias), sdpa(exact, bias), ulps=ulps_of_scores(qkv, scale))
    q, k, _ = exact.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * qkv.shape[-1] ** -0.5 + bias[:, None, None]
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=2e-6)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(dtype: torch.dtype, poisoned: None) -> None:
    """Lengths around those of tiles, panels and blocks; head sizes of whole vectors, of less and odd ones."""
    for n, dim in zip(
        (1, 2, 5, 8, 16, 17, 31, 33, 65, 113, 257, 258, 300, 513),
        (64, 16, 1, 33, 80, 64, 8, 36, 128, 7, 64, 20, 3, 32),
        strict=True,
    ):
        qkv = torch.randn(2, n, 3, 3, dim, dtype=dtype)
        assert_attention(qkv, dim**-0.5)
        assert_attention(qkv, dim**-0.5, torch.randint(1, 9, (2, n)).float().log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales(dtype: torch.dtype) -> None:
    qkv = torch.randn(1, 70, 3, 2, 64, dtype=dtype)
    for scale in (1.0, 1e-30, 0.0, -0.25):
        assert_attention(qkv, scale, torch.randn(1, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_strides_change_nothing(dtype: torch.dtype) -> None:
    """Threads that pack heads of their own, and threads that share one."""
    whole = torch.randn(2, 299, 3, 5, 70, dtype=dtype)
    qkv, threads = whole[:, 9:-3, :, ::2, 3:67], torch.get_num_threads()
    expected = assert_attention(qkv.contiguous(), 0.125)
    try:
        for count in (1, 2, 4, 7, 9):
            torch.set_num_threads(count)
            assert torch.equal(cpu.attention_forward(qkv, 0.125, False)[0], expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_left_out(dtype: torch.dtype) -> None:
    """The first block of keys may be left out, or all."""
    qkv, bias = torch.randn(2, 600, 3, 1, 32, dtype=dtype), torch.zeros(2, 600)
    bias[0, :590], bias[1] = -math.inf, -math.inf
    out, lse = cpu.attention_forward(qkv, 0.2, True, bias)
    alone = cpu.attention_forward(qkv[:1, 590:], 0.2, True)
    torch.testing.assert_close((out[:1, 590:], lse[:1, :, 590:]), alone)
    assert not out[1].any()
    assert lse[1].eq(math.inf).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", [3, 299], ids=["first", "last"])
def test_infinities_and_nan(value: float, key: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(1, 300, 3, 1, 16, dtype=dtype)
        qkv[:, :, 0, :, 0] = qkv[:, :, 0, :, 0].abs() + 1
        qkv[:, 5, 0, 0, 0] *= -1
        qkv[:, key, 1, 0, 0] = value
        with sdpa_kernel(SDPBackend.MATH):
            expected = sdpa(qkv.float(), torch.zeros(1, 300))
        out = cpu.attention_forward(qkv, 0.25, False)[0]
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)
        qkv[:, :, 1, 0, 0] = -math.inf
        qkv[:, :, 0, 0, 0] = 1
        assert cpu.attention_forward(qkv, 0.25, False)[0].eq(0).all()
