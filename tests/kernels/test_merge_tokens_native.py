"""The C++ ``bipartite_groups`` and ``merge_tokens`` by each set of instructions that they are compiled for."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from segmenter_fast.kernels import bipartite_groups, merge_tokens, reference
from support.accuracy import assert_as_accurate, with_gradients

from .conftest import Backend
from .test_tokens import merging

pytestmark = pytest.mark.usefixtures("instructions", "no_peer")
CPU = Backend("cpu", "cpu", (torch.float32, torch.bfloat16))
cpu = importlib.import_module("segmenter_fast.kernels.cpu.tokens")


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's formulations are not what runs."""
    monkeypatch.setattr(cpu, "_shares", None)
    monkeypatch.setattr(cpu, "reference", None)


def special_values(batch: int, sources: int) -> Tensor:
    pool = torch.tensor([0.0, -0.0, 0.5, 0.5, -1.0, 0.25, math.nan, math.inf, -math.inf, 1e-45, -1e-45, -3.0])
    return pool[torch.randint(len(pool), (batch, sources))]


def means_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: function(*arguments, **options)[0]


def test_groups() -> None:
    """Ties, signed zeros, denormals, infinities and NaN; every number that merges, and thresholds."""
    for tokens in (2, 3, 9, 40, 257):
        sources = tokens // 2
        match = torch.randint((tokens + 1) // 2, (3, 2 * sources))[:, ::2]
        for value in (special_values(3, sources), torch.rand(sources, 3).mT, torch.full((3, sources), math.nan)):
            for merged in {0, 1, sources // 3, sources - 1, sources}:
                index = bipartite_groups(value, match, tokens, merged, 2)
                assert torch.equal(index, reference.bipartite_groups(value, match, tokens, merged, 2))
            for threshold in (0.0, 0.25, -math.inf, math.inf):
                index = bipartite_groups(value, match, tokens, None, 1, threshold)
                assert torch.equal(index, reference.bipartite_groups(value, match, tokens, None, 1, threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means(dtype: torch.dtype, poisoned: None) -> None:
    """Widths of whole vectors and others, weights of other dtypes and of 0, many images and one."""
    for b, m, groups, dim in ((1, 1, 1, 1), (5, 40, 7, 3), (1, 300, 280, 64), (2, 129, 90, 33), (3, 50, 200, 100)):
        tokens, grad = torch.randn(b, m, dim).to(dtype), torch.randn(b, groups, dim).to(dtype)
        index, weights = merging(CPU, b, m, groups)
        for given in (None, weights, weights.double() - 1, torch.zeros(b, m)):
            arguments = {"index": index, "groups": groups, "weights": given}
            ours, peer, exact = (
                with_gradients(means_of(function), [rows], grad, **arguments)
                for function, rows in (
                    (merge_tokens, tokens),
                    (reference.merge_tokens, tokens),
                    (reference.merge_tokens, tokens.double()),
                )
            )
            for results in zip(ours, peer, exact, strict=True):
                assert_as_accurate(*results)
            sizes = merge_tokens(tokens, index, groups, given)[1]
            assert torch.equal(sizes, reference.merge_tokens(tokens, index, groups, given)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_strides_change_nothing(dtype: torch.dtype) -> None:
    whole, threads = torch.randn(3, 2, 601, 72).to(dtype), torch.get_num_threads()
    index, weights = merging(CPU, 3, 601, 400)
    value, match = torch.rand(3, 300), torch.randint(301, (3, 300))
    for tokens in (whole[:, 1, :, 3:-2], whole[:, :, :, 1:9:2].flatten(1, 2)[:, ::2]):
        grad = torch.randn(3, 400, tokens.shape[2]).to(dtype)
        expected: list[Tensor] = []
        try:
            for count in (1, 1, 2, 5, 40):
                torch.set_num_threads(count)
                rows = tokens if expected else tokens.contiguous()
                options = {"index": index, "groups": 400, "weights": weights}
                found = [*with_gradients(means_of(merge_tokens), [rows], grad, **options)]
                found += [merge_tokens(rows[2:], index[2:], 400, weights[2:])[0]]
                found += [bipartite_groups(value, match, 601, 77, 3)]
                expected = expected or found
                assert all(torch.equal(ours, other) for ours, other in zip(found, expected, strict=True))
                assert torch.equal(found[2][0], found[0][2])
        finally:
            torch.set_num_threads(threads)


def test_values_that_are_not_finite_stay_in_their_groups() -> None:
    tokens = torch.randn(1, 60, 20)
    index = torch.arange(60)[None] // 3
    expected, _ = merge_tokens(tokens, index, 20)
    tokens[0, 4], tokens[0, 30, 3] = math.nan, math.inf
    merged, _ = merge_tokens(tokens, index, 20)
    assert merged[0, 1].isnan().all()
    assert merged[0, 10, 3] == math.inf
    others = [group for group in range(20) if group not in (1, 10)]
    assert torch.equal(merged[0, others], expected[0, others])


@pytest.mark.parametrize("wrong", [-1, 7, 1 << 40])
def test_indices_outside_are_refused(wrong: int) -> None:
    index = torch.zeros(2, 10, dtype=torch.int64)
    index[1, 7] = wrong
    with pytest.raises(IndexError, match=rf"index must be in \[0, 7\), got {wrong}"):
        merge_tokens(torch.randn(2, 10, 4), index, 7)
    with pytest.raises(IndexError, match=rf"match must be in \[0, 5\), got {wrong}"):
        bipartite_groups(torch.rand(2, 5), index[:, ::2] + index[:, 1::2], 10, 5)
