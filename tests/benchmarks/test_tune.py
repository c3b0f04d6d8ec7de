"""The tuner replaces ``launch_config`` of a kernel module during a call, and restores it."""

from __future__ import annotations

from dataclasses import replace
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


def test_neighbours_are_near_and_within_bounds() -> None:
    shipped = Tiles(1, 256, 4, 3)
    found = tune.neighbours(shipped)
    assert shipped not in found
    assert len(set(found)) == len(found)
    assert {t.block_m for t in found} == {1, 2}
    assert {t.block_n for t in found} == {128, 256}
    assert {t.num_warps for t in found} == set(tune.WARPS)
    changes = [sum(a != b for a, b in zip(t, shipped, strict=True)) for t in found]
    assert changes == sorted(changes)
    assert set(changes) == {1, 2}


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


def test_a_call_that_asks_for_no_configuration_is_an_error() -> None:
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(16, 16, 4, 1), __name__="some_kernel")
    with pytest.raises(RuntimeError, match="some_kernel"):
        tune.shipped_config(module, lambda: None)


def test_the_search_finds_the_fastest_right_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that reads the time off the configuration.

    32 x 128 with 1 warp is best. 1 stage is wrong, and tiles of 256 do not fit.
    """
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(64, 64, 4, 3))

    def ours(*inputs: Any) -> Tiles:
        tiles = module.launch_config()
        if tiles.block_n == 256:
            raise RuntimeError("out of resources: shared memory")
        return tiles

    small = attention.attention_case(CPU, torch.float32, 1, 9, "forward")
    case = replace(small, variants={OURS: Variant(ours)}, judge=lambda inputs: lambda out: float(out.num_stages == 1))

    def measure(calls: dict[str, list[Any]], *_: Any, **__: Any) -> dict[str, Timing]:
        configs = {name: variant_calls[0]() for name, variant_calls in calls.items()}
        assert all(name == str(config) for name, config in configs.items())
        assert all(c.num_stages > 1 and c.block_n < 256 for c in configs.values()), "only right ones are timed"
        return {
            name: timing_of(1.0 + abs(c.block_m - 32) + abs(c.block_n - 128) + c.num_warps + c.num_stages)
            for name, c in configs.items()
        }

    monkeypatch.setattr(cases, "measure", measure)
    monkeypatch.setattr(tune, "ROUND", 20)
    row = tune.search(case, module, float("inf"))
    assert row[0] == str(Tiles(64, 64, 4, 3))
    assert row[2] == str(Tiles(32, 128, 1, 2))
    assert int(row[6]) > 0, "the wrong ones were counted"


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
        tune.tune(next(iter(OPS)))
    with pytest.raises(ValueError, match="unknown op softmax"):
        tune.tune("softmax")
