"""Random chains of tensor functions on a resize that waits, beside the same chain on the plain tensor."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.accelerate import lazy_functions
from segmenter_fast.accelerate.full_size import FullSizeCalls
from segmenter_fast.accelerate.lazy import PatchScores, Upsampled, patch_scores
from support.tensor_chains import Step, is_nan, step

CASES = int(os.environ.get("FUZZ_CASES", "400"))


def attempt(function: Step, x: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        return function(x)
    except Exception as error:
        return error


def compare(ours: Any, plain: Any, what: str, rounded: bool = False) -> None:
    if isinstance(plain, Exception):
        assert type(ours) is type(plain), f"{what}: {ours!r} instead of {plain!r}"
    elif isinstance(plain, Tensor):
        if isinstance(error := attempt(lambda x: x.detach() + x.new_zeros(()), plain), Exception):
            return compare(attempt(lambda x: x.detach() + x.new_zeros(()), ours), error, what)
        assert isinstance(ours, Tensor), what
        for fact in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(ours, fact) == getattr(plain, fact), f"{what}: {fact}"
        assert ours.stride() == plain.stride() or ours.numel() == 0, f"{what}: strides"
        low = plain.dtype in (torch.float16, torch.bfloat16)
        limits = {"rtol": 2e-2, "atol": 2e-2} if low or rounded else {"rtol": 1e-5, "atol": 1e-5}
        a, b = (t.detach() for t in (ours, plain))
        torch.testing.assert_close(a + 0 if a.dtype != torch.bool else a | a, b, **limits, equal_nan=True, msg=what)
    elif isinstance(plain, (tuple, list)):
        assert not isinstance(ours, Exception), f"{what}: {ours!r}"
        assert len(ours) == len(plain), what
        for a, b in zip(ours, plain, strict=True):
            compare(a, b, what, rounded)
    elif isinstance(plain, np.ndarray):
        np.testing.assert_allclose(ours, plain, rtol=2e-2 if plain.dtype == np.float16 else 1e-5, atol=1e-3)
    elif isinstance(plain, float):
        assert ours == pytest.approx(plain, rel=2e-2, abs=1e-2, nan_ok=True), what
    elif not isinstance(plain, str):  # text of float32 values may differ in its last digit
        assert ours == plain, what


def start(r: random.Random, seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Scores for both sides, and a resize. Values and weights are such that float32 has no ties."""
    batch, classes, h, w = r.choice((1, 2)), r.choice((1, 2, 5)), r.randint(1, 5), r.randint(1, 5)
    dtype = r.choice((torch.float64, torch.float64, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, classes, h, w, dtype=torch.float64, generator=generator)
    resize: dict[str, Any] = {
        "size": (r.randint(h, 4 * h), r.randint(w, 4 * w)),
        "align_corners": r.choice((None, True)),
    }
    if dtype == torch.float32:
        scores = (scores * 8).round() + torch.arange(classes)[:, None, None] / 1024
        resize = {"scale_factor": r.choice((1, 2, 4))}
    scores = scores.to(dtype)
    if r.random() < 0.3:
        scores = scores.contiguous(memory_format=torch.channels_last)
    grad = r.random() < 0.7
    return scores.clone().requires_grad_(grad), scores.clone().requires_grad_(grad), resize


def tensors(result: Any) -> list[Any]:
    return [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (tuple, list)) else []


def run_chain(seed: int) -> int:
    """Run a chain on both sides; return how many of its tensors waited."""
    r = random.Random(seed)
    ours_leaf, plain_leaf, resize = start(r, seed)
    marked = patch_scores(ours_leaf * 1, FullSizeCalls())
    variables = [
        (F.interpolate(marked, mode="bilinear", **resize), F.interpolate(plain_leaf * 1, mode="bilinear", **resize))
    ]
    what, waited, rounded = f"chain {seed}: interpolate({resize})", 0, False
    assert isinstance(variables[0][0], Upsampled), what
    for _ in range(r.randint(1, 6)):
        ours, plain = variables[-1] if r.random() < 0.7 else r.choice(variables)
        name, function = step(r, plain, rounded, "> resize" in what, "->" not in what)
        what += f" -> {name}"
        results = [attempt(function, x, seed) for x in (ours, plain)]
        found = list(zip(*map(tensors, results), strict=False))
        waited += sum(isinstance(a, Upsampled) for a, _ in found)
        # Values are compared at the end: looking at them here would make the resized tensor.
        if not isinstance(results[1], Tensor):
            compare(*results, what)
        variables += [pair for pair in found if isinstance(pair[1], Tensor) and not is_nan(pair[1])]
        # Equal values of the border may differ in their last digit after max: later labels are ties.
        rounded = (
            rounded
            or "max" in name
            or "topk" in name
            or any(isinstance(b, Tensor) and b.dtype == torch.float16 for _, b in found)
        )
    results = []
    for side in (0, 1):
        floats = [pair[side] for pair in variables if pair[1].is_floating_point() and pair[1].requires_grad]
        results.append(attempt(lambda xs: sum(x.double().sum() for x in xs).backward(), floats) if floats else None)
    if plain_leaf.grad is not None and not isinstance(results[1], Exception):
        assert not isinstance(results[0], Exception), f"{what}: {results[0]!r}"
        compare(ours_leaf.grad, plain_leaf.grad, f"{what}: gradient", rounded)
    for ours, plain in variables:
        compare(ours, plain, what, rounded)
    return waited


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests' small tensors, which PyTorch computes faster from the resize, take the fused ops."""
    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})


def test_random_chains() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        waited = sum(run_chain(seed) for seed in range(CASES))
    assert waited > CASES / 3


def test_scores_per_patch_are_ordinary() -> None:
    scores = patch_scores(torch.randn(2, 3, 4, 5), FullSizeCalls())
    assert isinstance(scores, PatchScores)
    assert type(scores * 2) is Tensor
    assert type(pickle.loads(pickle.dumps(scores))) is Tensor
    assert isinstance(scores.detach()[:1].float().contiguous(), PatchScores)
