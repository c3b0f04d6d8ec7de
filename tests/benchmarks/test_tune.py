"""The tuner replaces ``launch_config`` of a kernel module during a call, and restores it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from segmenter_fast.benchmarks import case as cases
from segmenter_fast.benchmarks import tune
from segmenter_fast.benchmarks.case import OURS, Case, Variant
from segmenter_fast.benchmarks.ops import OPS, attention, mask_scores, upsample
from segmenter_fast.benchmarks.timing import Timing
from support.benchmarks import timing_of

CPU = torch.device("cpu")


class Tiles(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def test_neighbours_differ_in_one_field_within_bounds() -> None:
    shipped = Tiles(1, 256, 4, 3)
    found = tune.neighbours(shipped)
    assert len(set(found)) == len(found)
    assert all(sum(a != b for a, b in zip(t, shipped, strict=True)) == 1 for t in found)
    assert {t.block_m for t in found} == {1, 2}
    assert {t.block_n for t in found} == {128, 256}
    assert {t.num_warps for t in found} == set(tune.WARPS)
    assert {t.num_stages for t in found} == set(tune.STAGES)


def test_one_part_changes_at_a_time() -> None:
    shipped = (Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2))
    assert all((a == shipped[0]) != (b == shipped[1]) for a, b in tune.neighbours(shipped))


def test_a_configuration_reaches_the_call_and_goes_again() -> None:
    module: Any = SimpleNamespace(launch_config=lambda length: Tiles(length, 64, 4, 3))
    original = module.launch_config

    def call() -> Tiles:
        return module.launch_config(128)

    assert tune.shipped_config(module, call) == Tiles(128, 64, 4, 3)
    other = Tiles(32, 32, 2, 1)
    assert tune.with_config(other, Tiles(128, 64, 4, 3), module, call)() == other
    assert tune.with_config(other, Tiles(64, 64, 4, 3), module, call)() == Tiles(128, 64, 4, 3), (
        "another launch is left alone"
    )
    assert module.launch_config is original


def test_a_configuration_reaches_what_a_module_keeps() -> None:
    module: Any = SimpleNamespace(launch_config=lambda length: Tiles(length, 64, 4, 3))
    module.plan = lru_cache(lambda length: module.launch_config(length))
    shipped, other = module.plan(128), Tiles(32, 32, 2, 1)
    assert tune.shipped_config(module, lambda: module.plan(128)) == shipped
    assert tune.with_config(other, shipped, module, lambda: module.plan(128))() == other
    assert module.plan(128) == shipped


def test_a_call_that_asks_for_no_configuration_is_an_error() -> None:
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(16, 16, 4, 1), __name__="some_kernel")
    with pytest.raises(RuntimeError, match="some_kernel"):
        tune.shipped_config(module, lambda: None)


def test_the_best_by_bound_are_timed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Bounds and a clock that read the configuration: twice the bound, but one configuration is faster than it looks.

    One stage gives wrong output, tiles of 256 do not fit, and one warp cannot be counted.
    """
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(64, 128, 4, 3))

    def ours(*inputs: Any) -> Tiles:
        tiles = module.launch_config()
        if tiles.block_n == 256:
            raise RuntimeError("out of resources: shared memory")
        return tiles

    def bound(call: Any) -> float | None:
        try:
            tiles = call()
        except RuntimeError:
            return 0.5
        return None if tiles.num_warps == 1 else tiles.block_m / 64 + tiles.num_stages / 8

    def measure(calls: dict[str, list[Any]], *_: Any, **__: Any) -> dict[str, Timing]:
        configs = {name: variant_calls[0]() for name, variant_calls in calls.items()}
        assert all(name == str(config) for name, config in configs.items())
        assert all(c.num_stages > 1 and c.block_n < 256 for c in configs.values()), "only right ones are timed"
        return {
            name: timing_of(0.1 if config.num_warps == 8 else 2 * (config.block_m / 64 + config.num_stages / 8))
            for name, config in configs.items()
        }

    small = attention.attention_case(CPU, torch.float32, 1, 9, "forward")
    case = replace(small, variants={OURS: Variant(ours)}, judge=lambda inputs: lambda out: float(out.num_stages == 1))
    monkeypatch.setattr(cases, "measure", measure)
    monkeypatch.setattr(tune, "static_bound", bound)
    monkeypatch.setattr(tune, "kernel_module", lambda case: module)
    monkeypatch.setattr(tune, "_case", lambda op, number: (case, case.make_inputs(torch.Generator())))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    own = tune.shipped_of(case)
    bounds = {config: tune.build("attention", 0, config, own) for config in (own, *tune.neighbours(own))}
    row = tune.calibrate(case, own, bounds, 8)
    shipped, ms, counted, best, fastest, gain, factor, rank, timed, skipped = row
    assert (shipped, float(ms), float(counted)) == (str(Tiles(64, 128, 4, 3)), 2.75, 1.375)
    assert (best, float(fastest), float(gain)) == (str(Tiles(64, 128, 8, 3)), 0.1, 27.5)
    assert float(factor) == 2
    assert 0 < float(rank) < 1
    # One of eight gives wrong output; of the others one does not fit, and the one without a bound comes last.
    assert (int(timed), int(skipped)) == (7, 2)


def test_rank_correlation() -> None:
    assert tune.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert tune.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert tune.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.949, abs=1e-3)
    assert math.isnan(tune.spearman([1, 1, 1], [1, 2, 3]))


F32, MASKS = torch.float32, upsample.Masks("smooth", 7, 4, 16)
CASES = {pass_: attention.attention_case(CPU, F32, 1, 17, pass_) for pass_ in ("forward", "backward")}
CASES |= {
    op: upsample.upsample_case(op, CPU, F32, 1, next(iter(table.copies)), MASKS) for op, table in upsample.OPS.items()
}
CASES["mask_scores"] = mask_scores.scores_case(CPU, F32, 1, "forward", 17, 16, 7)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.interpret
def test_every_kernel_asks_for_its_configuration(case: Case) -> None:
    inputs = case.make_inputs(torch.Generator().manual_seed(0))
    module, call = tune.kernel_module(case), case.variant(OURS).bind(inputs)
    shipped = tune.shipped_config(module, call)
    under = tune.with_config(tune.neighbours(shipped)[0], shipped, module, call)
    assert case.judge(inputs)(under()) <= 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="sees no such CUDA or ROCm device"):
        tune.tune([next(iter(OPS))])
    with pytest.raises(ValueError, match="unknown ops softmax"):
        tune.tune(["attention", "softmax"])
