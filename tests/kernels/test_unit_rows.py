"""Rows to compare tokens by, against float64: shapes, strides, backends, sets of instructions, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.kernels import reference, unit_rows
from support.accuracy import assert_as_accurate

from .conftest import Backend


def peer(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, channels: int | None) -> Tensor:
    """PyTorch's ops in the dtype of ``x``."""
    z = F.layer_norm(x, weight.shape, weight, bias, eps)
    channels = min(channels or z.shape[2], z.shape[2])
    return F.normalize(torch.stack([z[..., n::channels].sum(-1) for n in range(channels)], -1), dim=-1)


def assert_rows(x: Tensor, channels: int | None, eps: float = 1e-5, with_bias: bool = True) -> Tensor:
    dim = x.shape[2]
    weight, bias = (torch.linspace(0.5, 2, dim, device=x.device) + n for n in range(2))
    given = weight.to(x.dtype), bias.to(x.dtype) if with_bias else None
    rows = unit_rows(x, *given, eps, channels)
    assert rows.dtype == x.dtype
    double = given[0].double(), None if given[1] is None else given[1].double()
    assert_as_accurate(rows, peer(x, *given, eps, channels), peer(x.double(), *double, eps, channels))
    return rows


SHAPES = [(1, 9, 1), (3, 7, 5), (2, 33, 16), (1, 4, 100), (2, 65, 192), (1, 70, 384), (1, 3, 1030)]


@pytest.mark.parametrize("channels", [None, 1, 7, 64, 100, 128, 5000])
def test_shapes(backend_or_pytorch: Backend, channels: int | None, poisoned: None) -> None:
    for dtype in backend_or_pytorch.dtypes:
        for shape in SHAPES:
            assert_rows((torch.randn(shape) * 3 + 1).to(backend_or_pytorch.device, dtype), channels)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instructions(dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, strides, and rows of NaN and infinities beside others change nothing; PyTorch's ops do not run."""
    wide, threads = (torch.randn(3, 301, 200) * 3).to(dtype), torch.get_num_threads()
    for x in (wide[1:, 1:, 4:196], wide.mT[:, 1:, ::2], wide[:0], wide[:, :0]):
        for channels in (None, 64, 100):
            expected = assert_rows(x.contiguous(), channels, with_bias=channels != 64)
            with monkeypatch.context() as patch:
                if x.numel():
                    patch.setattr(reference, "unit_rows", None)
                try:
                    for count in (1, 2, 5):
                        torch.set_num_threads(count)
                        assert torch.equal(assert_rows(x, channels, with_bias=channels != 64), expected)
                finally:
                    torch.set_num_threads(threads)
    broken = wide[:, :, :100].contiguous()
    expected = assert_rows(broken, 64)
    broken[:, ::3, 5], broken[:, 1::6, 7] = math.nan, math.inf
    rows = assert_rows(broken, 64)
    assert rows[:, ::3].isnan().all()
    assert torch.equal(rows[:, 2::3], expected[:, 2::3])


def test_constant_rows_are_zero_without_a_bias(backend_or_pytorch: Backend) -> None:
    x = torch.full((1, 5, 48), 2.0, device=backend_or_pytorch.device)
    assert not unit_rows(x, x[0, 0], None).any()
    assert not assert_rows(x, 12).isnan().any()


def test_there_is_no_gradient_and_a_compiler_sees_one_graph(backend_or_pytorch: Backend) -> None:
    x, weight = (torch.randn(shape, device=backend_or_pytorch.device).requires_grad_() for shape in ((2, 9, 16), 16))
    rows = unit_rows(x, weight, weight, channels=8)
    assert not rows.requires_grad
    compiled = torch.compile(
        lambda x: unit_rows(x * 1, weight, weight, channels=8), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), rows)


def test_errors_name_the_argument(backend_or_pytorch: Backend) -> None:
    x = torch.zeros(2, 5, 16, device=backend_or_pytorch.device)
    weight = x[0, 0]
    for call, kind, message in (
        (lambda: unit_rows(x[0], weight), ValueError, r"x must be \(B, M, D\).*got \(5, 16\)"),
        (lambda: unit_rows(x[..., :0], weight[:0]), ValueError, r"D at least 1, got \(2, 5, 0\)"),
        (lambda: unit_rows(x.long(), weight), TypeError, "x must be float32"),
        (lambda: unit_rows(x, weight[1:]), ValueError, r"weight must be \(D,\), here \(16,\), got \(15,\)"),
        (lambda: unit_rows(x, weight, weight.long()), TypeError, "bias must be float32"),
        (lambda: unit_rows(x, weight, x), ValueError, r"bias must be \(D,\)"),
        (lambda: unit_rows(x, weight, channels=0), ValueError, "channels must be at least 1, got 0"),
    ):
        with pytest.raises(kind, match=message):
            call()
