"""Matching and merging of tokens against their reference and float64."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.kernels import best_match, bipartite_groups, merge_tokens, reference
from support.accuracy import assert_as_accurate, with_gradients

from .conftest import Backend

EXAMPLES = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_best(a: Tensor, b: Tensor, lengths: Tensor | None = None) -> None:
    """Values as accurate as PyTorch's product, and matches whose exact product falls no shorter of the best."""
    value, match = best_match(a, b, lengths)
    assert value.shape == match.shape == a.shape[:2]
    assert (value.dtype, match.dtype) == (torch.promote_types(a.dtype, torch.float32), torch.int64)
    if value.numel() == 0:
        return
    exact, _ = reference.best_match(a.double(), b.double(), lengths)
    peer = torch.where((products := a @ b.mT).isnan(), -math.inf, products)
    if lengths is not None:
        peer[torch.arange(b.shape[1], device=b.device) >= lengths[:, None, None].expand_as(peer)] = -math.inf
    chosen = (a.double() * b.double().gather(1, match[..., None].expand_as(a))).sum(-1)
    assert_as_accurate(value, peer.amax(-1), exact)
    finite = exact.isfinite()
    allowed = (
        2 * (peer.double() - reference_products(a, b))[peer.isfinite()].abs().max() + 1e-6 * exact[finite].abs().max()
    )
    assert ((exact - chosen)[finite] <= allowed).all()


def reference_products(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().mT


@given(
    b=st.integers(0, 3),
    s=st.integers(0, 140),
    t=st.integers(1, 140),
    dim=st.sampled_from([1, 16, 48, 64, 200]),
    index=st.integers(0, 2),
    ragged=st.booleans(),
)
@EXAMPLES
def test_best_match(backend_or_pytorch: Backend, b: int, s: int, t: int, dim: int, index: int, ragged: bool) -> None:
    torch.manual_seed(0)
    dtype = backend_or_pytorch.dtypes[index % len(backend_or_pytorch.dtypes)]
    a, rows = (torch.randn(b, n, dim, device=backend_or_pytorch.device).to(dtype) for n in (s, t))
    lengths = torch.randint(1, t + 1, (b,), device=backend_or_pytorch.device) if ragged else None
    assert_best(a, rows, lengths)


def test_tokens_match_in_place(backend_or_pytorch: Backend, poisoned: None) -> None:
    """Sources and destinations are every other token of one tensor, which is not copied first."""
    for dtype in backend_or_pytorch.dtypes:
        z = F.normalize(torch.randn(2, 1 + 131, 64, device=backend_or_pytorch.device) + 1, dim=-1).to(dtype)[:, 1:]
        assert_best(z[:, 1::2], z[:, ::2])
        value, match = best_match(z[:, 1::2], z[:, ::2])
        contiguous = best_match(z[:, 1::2].contiguous(), z[:, ::2].contiguous())
        assert torch.equal(value, contiguous[0])
        assert torch.equal(match, contiguous[1])


def test_ties_nan_and_infinities(backend_or_pytorch: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend_or_pytorch.name == "interpret":  # NumPy's maximum keeps NaN, a GPU's drops it
        fmax = "triton.runtime.interpreter.InterpreterBuilder.create_maxnumf"
        monkeypatch.setattr(fmax, lambda builder, one, other: builder.binary_op(one, other, np.fmax))
    for dtype in backend_or_pytorch.dtypes:
        b = (
            torch.eye(16, device=backend_or_pytorch.device, dtype=dtype).repeat(6, 1)[None] * 3
        )  # rows 0, 16, 32, ... are equal
        value, match = best_match(b[:, :16], b)
        assert match.tolist() == [list(range(16))]
        assert (value == 9).all()
        b[0, 0] = b[0, 17] = math.nan
        a = b[:, 1:5].clone()
        a[0, 3] = math.nan
        value, match = best_match(a, b)
        assert match.tolist() == [[1, 2, 3, 0]]
        assert value.tolist() == [[9, 9, 9, -math.inf]]
        b[:] = -math.inf
        assert best_match(a[:, :1].abs() + 1, b)[0].tolist() == [[-math.inf]]


def test_lengths_of_nothing(backend_or_pytorch: Backend) -> None:
    a = torch.randn(3, 5, 16, device=backend_or_pytorch.device)
    value, match = best_match(a, a, torch.tensor([0, 1, 9], dtype=torch.int32, device=backend_or_pytorch.device))
    assert (value[0] == -math.inf).all()
    assert not match[:2].any()
    torch.testing.assert_close(value[1], (a[1] * a[1, 0]).sum(-1))
    torch.testing.assert_close(value[2:], reference.best_match(a[2:], a[2:])[0])


def test_tiles_and_near_ties(backend_or_pytorch: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines near 1 differ by less than bfloat16's step there."""
    monkeypatch.setattr(importlib.import_module("segmenter_fast.kernels.cpu.tokens"), "_TILE_SCORES", 1000)
    for dtype in backend_or_pytorch.dtypes:
        z = F.normalize(torch.randn(1, 200, 384) * 0.1 + torch.randn(384), dim=-1).to(backend_or_pytorch.device, dtype)
        assert_best(z[:, 1::2], z[:, ::2])
        value, match = best_match(z[:, 1::2], z[:, ::2])
        best, expected = reference.best_match(z[:, 1::2], z[:, ::2])
        assert best.min() > 0.9
        assert (match == expected).float().mean() >= 0.95
        assert (best - value).abs().max() < 0.02 * (1 - best).max()


def values(backend: Backend, b: int, sources: int) -> Tensor:
    """Similarities with ties, signed zeros, infinities and NaN."""
    pool = torch.tensor([0.0, -0.0, 0.5, 0.5, -1.0, 0.25, math.nan, math.inf, -math.inf, 1e-45, -3.0])
    return pool[torch.randint(len(pool), (b, sources))].to(backend.device)


@given(b=st.integers(0, 3), tokens=st.integers(1, 200), prefix=st.integers(0, 2), share=st.floats(0, 1))
@EXAMPLES
def test_bipartite_groups(backend_or_pytorch: Backend, b: int, tokens: int, prefix: int, share: float) -> None:
    torch.manual_seed(0)
    sources, merged = tokens // 2, round(share * (tokens // 2))
    match = torch.randint(max(tokens - sources, 1), (b, sources), device=backend_or_pytorch.device)
    for value in (torch.rand(b, sources, device=backend_or_pytorch.device), values(backend_or_pytorch, b, sources)):
        index = bipartite_groups(value, match, tokens, merged, prefix)
        assert torch.equal(index, reference.bipartite_groups(value, match, tokens, merged, prefix))
        for image in index:
            assert image.unique().tolist() == list(range(prefix + tokens - merged))
        index = bipartite_groups(value, match, tokens, None, prefix, 0.25)
        assert torch.equal(index, reference.bipartite_groups(value, match, tokens, None, prefix, 0.25))


def test_groups_of_a_drawing(backend_or_pytorch: Backend) -> None:
    value = torch.tensor([[0.9, math.nan, 0.9, -1.0]], device=backend_or_pytorch.device)
    match = torch.tensor([[3, 0, 0, 1]], device=backend_or_pytorch.device)

    def groups(merged: int | None, threshold: float | None = None) -> list[int]:
        return bipartite_groups(value, match, 8, merged, 1, threshold)[0].tolist()

    assert groups(0) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert groups(1) == [0, 1, 6, 2, 3, 4, 5, 6, 7]  # the first of equal ones
    assert groups(2) == groups(None, 0.0) == [0, 1, 5, 2, 3, 4, 1, 5, 6]
    assert groups(3) == [0, 1, 5, 2, 3, 4, 1, 5, 2]
    assert groups(4) == [0, 1, 4, 2, 1, 3, 1, 4, 2]


def merging(backend: Backend, b: int, m: int, groups: int) -> tuple[Tensor, Tensor]:
    """Groups, of which some are empty and one is large, and weights."""
    index = torch.randint(groups, (b, m), device=backend.device)
    index[:, m // 2 :: 3] = groups // 2
    return index, torch.randint(1, 9, (b, m), device=backend.device).float()


@given(
    b=st.integers(0, 3),
    m=st.integers(1, 150),
    groups=st.integers(1, 150),
    dim=st.sampled_from([1, 5, 64, 130]),
    index=st.integers(0, 2),
    weighted=st.booleans(),
)
@EXAMPLES
def test_merge_tokens(
    backend_or_pytorch: Backend, b: int, m: int, groups: int, dim: int, index: int, weighted: bool
) -> None:
    torch.manual_seed(0)
    dtype = backend_or_pytorch.dtypes[index % len(backend_or_pytorch.dtypes)]
    tokens = torch.randn(b, m, dim, device=backend_or_pytorch.device).to(dtype)
    of, weights = merging(backend_or_pytorch, b, m, groups)
    given_weights = weights if weighted else None
    grad_out = torch.randn(b, groups, dim, device=backend_or_pytorch.device).to(dtype)
    merged, sizes = merge_tokens(tokens, of, groups, given_weights)
    assert merged.dtype == dtype
    assert not sizes.requires_grad
    if b == 0:
        return
    torch.testing.assert_close(sizes, reference.merge_tokens(tokens, of, groups, given_weights)[1])

    def op(function, tokens: Tensor) -> tuple[Tensor, ...]:
        return with_gradients(lambda tokens: function(tokens, of, groups, given_weights)[0], [tokens], grad_out)

    ours, peers, oracles = (
        op(merge_tokens, tokens),
        op(reference.merge_tokens, tokens),
        op(reference.merge_tokens, tokens.double()),
    )
    for results in zip(ours, peers, oracles, strict=True):
        assert_as_accurate(*results)
    assert torch.equal(ours[0], merged)


def test_groups_beyond_a_block(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that the kernels visit in blocks, the interpreted ones in small blocks."""
    tokens, parts = 5001, ("bipartite_groups", "merge_tokens")
    if backend.name == "interpret":
        tokens, (grouping, summing) = 201, (importlib.import_module(f"segmenter_fast.kernels.gpu.{x}") for x in parts)
        monkeypatch.setattr(grouping, "_MOST", 64)
        for name, size in (("_TOKENS", 128), ("_WINDOW", 64), ("_MEMBERS", 16)):
            monkeypatch.setattr(summing, name, size)
    value, match = values(backend, 2, tokens // 2), torch.randint(tokens // 2, (2, tokens // 2), device=backend.device)
    match[:, ::3] = 5
    index = bipartite_groups(value, match, tokens, tokens // 4, 1)
    assert torch.equal(index, reference.bipartite_groups(value, match, tokens, tokens // 4, 1))
    x, groups = torch.randn(2, 1 + tokens, 3, device=backend.device), 1 + tokens - tokens // 4
    ours, sizes = merge_tokens(x, index, groups)
    (peer, expected), (exact, _) = (reference.merge_tokens(x, index, groups) for x in (x, x.double()))
    assert torch.equal(sizes, expected)
    assert_as_accurate(ours, peer, exact)


def test_a_token_alone_keeps_its_bits(backend_or_pytorch: Backend, poisoned: None) -> None:
    for dtype in backend_or_pytorch.dtypes:
        tokens = torch.randn(2, 50, 20, device=backend_or_pytorch.device).to(dtype)
        order = torch.stack([torch.randperm(50) for _ in range(2)]).to(backend_or_pytorch.device)
        merged, sizes = merge_tokens(tokens, order, 60, torch.full((2, 50), 7.0, device=backend_or_pytorch.device))
        assert torch.equal(merged.gather(1, order[..., None].expand_as(tokens)), tokens)
        assert not merged[:, 50:].any()
        assert not sizes[:, 50:].any()


def test_groups_without_weight_are_zero(backend_or_pytorch: Backend) -> None:
    tokens = torch.randn(1, 4, 16, device=backend_or_pytorch.device)
    index = torch.tensor([[0, 0, 1, 1]], device=backend_or_pytorch.device)
    weights = torch.tensor([[0.0, 0.0, 0.0, 2.0]], device=backend_or_pytorch.device)
    merged, grad = with_gradients(
        lambda x: merge_tokens(x, index, 3, weights)[0], [tokens], torch.ones(1, 3, 16).to(tokens)
    )
    assert torch.equal(merged[0, 1], tokens[0, 3])
    assert not merged[0, ::2].any()
    assert grad[0].sum(-1).tolist() == [0, 0, 0, 16]


def test_strides(backend_or_pytorch: Backend) -> None:
    tokens = torch.randn(3, 24, 2, 40, device=backend_or_pytorch.device)[1:, :, 0].mT.requires_grad_()  # (2, 40, 24)
    index, weights = merging(backend_or_pytorch, 2, 40, 11)
    given_index, given_weights = (x.repeat_interleave(2, 1)[:, ::2] for x in (index, weights))
    merged, sizes = merge_tokens(tokens, given_index, 11, given_weights)
    expected = reference.merge_tokens(tokens, index, 11, weights)
    torch.testing.assert_close((merged, sizes), expected)
    grad_out = torch.randn(24, 11, 2, device=backend_or_pytorch.device).permute(2, 1, 0)
    torch.testing.assert_close(*(torch.autograd.grad(x, tokens, grad_out) for x in (merged, expected[0])))
    grad_out = grad_out[:, :1, :1].expand_as(merged)
    merged = merge_tokens(tokens, index, 11, weights)[0]
    expected = reference.merge_tokens(tokens, index, 11, weights)
    torch.testing.assert_close(*(torch.autograd.grad(x, tokens, grad_out) for x in (merged, expected[0])))


def test_errors_name_the_argument(backend: Backend) -> None:
    device = backend.device
    a, index = torch.zeros(2, 5, 16, device=device), torch.zeros(2, 5, dtype=torch.int64, device=device)
    value, match = torch.zeros(2, 3, device=device), index[:, :3]
    for call, kind, message in (
        (lambda: best_match(a, a[:1]), ValueError, r"must share B and D, got \(2, 5, 16\) and \(1, 5, 16\)"),
        (lambda: best_match(a, a[:, :0]), ValueError, r"b must have at least one row.*\(2, 0, 16\)"),
        (lambda: best_match(a.long(), a), TypeError, "a must be float32"),
        (lambda: best_match(a, a.double()), TypeError, "share a dtype, got torch.float32 and torch.float64"),
        (lambda: best_match(a[..., ::2], a[..., :8]), ValueError, "a must have a last stride of 1"),
        (lambda: best_match(a, a, value[:, 0]), TypeError, "lengths must be int64 or int32"),
        (lambda: best_match(a, a, index), ValueError, r"lengths must be \(2,\), got \(2, 5\)"),
        (lambda: bipartite_groups(value, match, 9, 1), ValueError, r"here \(B, 4\), got \(2, 3\)"),
        (lambda: bipartite_groups(match, match, 7, 1), TypeError, "value must be float32"),
        (lambda: bipartite_groups(value, value, 7, 1), TypeError, "match must be int64"),
        (lambda: bipartite_groups(value, match, 7, 4), ValueError, r"merged must be in \[0, tokens // 2\].*got 4"),
        (lambda: bipartite_groups(value, match, 7, None), ValueError, "give merged or threshold"),
        (lambda: bipartite_groups(value, match, 7, 1, 0, 0.5), ValueError, "give merged or threshold"),
        (lambda: bipartite_groups(value, match, 7, 1, -1), ValueError, "prefix at least 0, got 7 and -1"),
        (lambda: merge_tokens(a, index[:, :4], 3), ValueError, r"must share B and M, got \(2, 5, 16\) and \(2, 4\)"),
        (lambda: merge_tokens(a.long(), index, 3), TypeError, "tokens must be float32"),
        (lambda: merge_tokens(a, a[..., 0], 3), TypeError, "index must be int64"),
        (lambda: merge_tokens(a, index, 0), ValueError, "groups must be at least 1, got 0"),
        (
            lambda: merge_tokens(a, index, 3, value),
            ValueError,
            r"weights must be \(B, M\), here \(2, 5\), got \(2, 3\)",
        ),
        (lambda: merge_tokens(a, index, 3, index), TypeError, "weights must be float32"),
        (
            lambda: merge_tokens(a, index, 3, a[..., 0].clone().requires_grad_()),
            ValueError,
            "weights require a gradient",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
