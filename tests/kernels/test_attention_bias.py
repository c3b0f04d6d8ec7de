"""Attention with a bias of each key against a float64 oracle, held to the error of PyTorch's own in the same dtype."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.kernels import attention, reference
from support.accuracy import assert_as_accurate, with_gradients

from .conftest import Backend
from .test_attention import inputs


def sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's own, with the bias in the dtype of ``qkv``, as it wants it."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = bias[:, None, None].to(qkv.dtype).expand(-1, -1, qkv.shape[1], -1)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def assert_attention(qkv: Tensor, grad_out: Tensor, bias: Tensor, ulps: float = 4.0) -> None:
    ours = with_gradients(attention, [qkv], grad_out, bias=bias)
    peers = with_gradients(sdpa, [qkv], grad_out, bias=bias)
    oracles = with_gradients(reference.attention, [qkv.double()], grad_out, bias=bias)
    assert_as_accurate(ours[0], peers[0], oracles[0], ulps=ulps)
    assert torch.equal(attention(qkv, bias=bias), ours[0]) or ours[0].device.type == "cpu"
    for index in range(3):
        assert_as_accurate(*(grads[:, :, index] for _, grads in (ours, peers, oracles)), ulps=ulps)


def log_sizes(backend: Backend, *shape: int) -> Tensor:
    return torch.randint(1, 9, shape, device=backend.device).float().log()


@pytest.mark.parametrize(("n", "dim"), [(2, 16), (65, 64), (129, 64), (150, 32), (67, 80)])
def test_lengths(backend: Backend, n: int, dim: int, poisoned: None) -> None:
    for dtype in backend.dtypes:
        assert_attention(*inputs(backend, 2, n, 2, dim, dtype), log_sizes(backend, 2, n))


def test_keys_that_are_left_out(backend: Backend, poisoned: None) -> None:
    """Padding changes nothing: images of a ragged batch have the results that they have alone."""
    qkv, grad_out = inputs(backend, 3, 100, 2, 32, torch.float32)
    bias = log_sizes(backend, 3, 100)
    bias[0, 65:] = bias[1, :70] = bias[2] = -math.inf
    grad_out[0, 65:] = grad_out[1, :70] = 0  # missing queries have no gradient
    out, grad = with_gradients(attention, [qkv], grad_out, bias=bias)
    for image, part in ((0, slice(65)), (1, slice(70, None))):
        one_qkv, one_grad, one_bias = (x[image : image + 1, part] for x in (qkv, grad_out, bias))
        alone = with_gradients(attention, [one_qkv], one_grad, bias=one_bias)
        torch.testing.assert_close((out[image, part], grad[image, part]), (alone[0][0], alone[1][0]))
    bias[:2] = log_sizes(backend, 2, 100)
    bias[0, 65:] = bias[1, :70] = -math.inf
    assert_attention(qkv[:2], grad_out[:2], bias[:2])
    assert not out[2].any()
    assert not grad[2].any()
    assert not grad[0, 65:, 1:].any()  # keys and values


def test_a_bias_of_zero_is_no_bias(backend: Backend) -> None:
    for dtype in backend.dtypes:
        qkv, _ = inputs(backend, 2, 90, 2, 32, dtype)
        ours, expected = (attention(qkv, bias=bias) for bias in (qkv.new_zeros(2, 90), None))
        torch.testing.assert_close(ours, expected)


def test_negative_scales_and_biases_of_other_dtypes(backend: Backend) -> None:
    qkv, grad_out = inputs(backend, 1, 80, 2, 16, torch.float32)
    bias = log_sizes(backend, 1, 80)
    for scale, dtype in ((-0.5, torch.float32), (0.0, torch.float64), (0.3, torch.bfloat16)):
        given = bias.to(dtype)
        ours = with_gradients(attention, [qkv], grad_out, bias=given, scale=scale)
        expected = with_gradients(reference.attention, [qkv.double()], grad_out, bias=given, scale=scale)
        torch.testing.assert_close(ours, tuple(value.float() for value in expected), rtol=1e-4, atol=1e-5)


def test_vmap(backend: Backend) -> None:
    qkv = torch.randn(2, 2, 9, 3, 2, 16, device=backend.device).requires_grad_()
    for bias, dim in ((log_sizes(backend, 2, 2, 9), 0), (log_sizes(backend, 2, 9), None)):
        results = []
        for function in (attention, reference.attention):
            out = torch.func.vmap(lambda qkv, bias, f=function: f(qkv, bias=bias), in_dims=(0, dim))(qkv, bias)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        torch.testing.assert_close(*results)


def test_errors_name_the_bias(backend: Backend) -> None:
    qkv = torch.zeros(2, 5, 3, 1, 16, device=backend.device)
    with pytest.raises(ValueError, match=r"bias must be \(B, N\), here \(2, 5\), got \(2, 1, 5\)"):
        attention(qkv, bias=qkv.new_zeros(2, 1, 5))
    with pytest.raises(TypeError, match="bias must be float32"):
        attention(qkv, bias=qkv.new_zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bias requires a gradient.*bias.detach\(\)"):
        attention(qkv, bias=qkv.new_zeros(2, 5).requires_grad_())
    with pytest.raises(ValueError, match="one device"):
        attention(qkv, bias=torch.zeros(2, 5, device="meta"))
