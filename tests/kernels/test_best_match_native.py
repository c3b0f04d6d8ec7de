"""The C++ ``best_match`` by each set of instructions that it is compiled for."""

from __future__ import annotations

import importlib

import pytest
import torch

from segmenter_fast.kernels import best_match, reference

from .test_tokens import assert_best

pytestmark = pytest.mark.usefixtures("instructions", "no_peer")


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products are not what runs."""
    monkeypatch.setattr(importlib.import_module("segmenter_fast.kernels.cpu.tokens"), "_TILE_SCORES", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(dtype: torch.dtype, poisoned: None) -> None:
    """Rows around groups and blocks of them, columns around vectors and panels, widths of whole vectors and others."""
    for s, t, dim in zip(
        (1, 5, 6, 7, 13, 14, 15, 29, 113, 300, 225, 2),
        (7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 100, 1),
        (1, 2, 3, 7, 8, 15, 33, 64, 130, 384, 31, 768),
        strict=True,
    ):
        a, b = torch.randn(3, s, dim).to(dtype), torch.randn(3, t, dim).to(dtype)
        assert_best(a, b)
        assert_best(a, b, torch.tensor([t // 2, t + 5, max(t - 1, 1)], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_nan_and_infinities(dtype: torch.dtype) -> None:
    """Products of few small numbers are exact and often equal."""
    special = [torch.nan, torch.inf, -torch.inf]
    for dim, pool in ((3, [-1.0, 0.0, 2.0]), (5, [1.0, 1.0, -2.0, 1.0] * 9 + special), (2, special)):
        numbers = torch.tensor(pool, dtype=dtype)
        a, b = (numbers[torch.randint(len(pool), (2, n, dim))] for n in (150, 203))
        for lengths in (None, torch.tensor([203, 0]), torch.tensor([40, -1])):
            value, match = best_match(a, b, lengths)
            expected, row = reference.best_match(a, b, lengths)
            assert torch.equal(value, expected)
            assert torch.equal(match, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_strides_change_nothing(dtype: torch.dtype) -> None:
    z = torch.randn(3, 2, 601, 72).to(dtype)[:, 1, :, 3:-2]
    lengths, threads = torch.tensor([[300, 1], [17, 1], [299, 1]])[:, 0], torch.get_num_threads()
    expected = best_match(z[:, 1::2].contiguous(), z[:, ::2].contiguous(), lengths)
    try:
        for count in (1, 2, 5, 40):
            torch.set_num_threads(count)
            for ours, theirs in zip(best_match(z[:, 1::2], z[:, ::2], lengths), expected, strict=True):
                assert torch.equal(ours, theirs)
            one = best_match(z[2:, 1::2], z[2:, ::2], lengths[2:])
            assert torch.equal(one[0][0], expected[0][2])
    finally:
        torch.set_num_threads(threads)
