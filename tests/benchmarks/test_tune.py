"""The tuner reaches the launchers through ``launch_config``, and leaves the modules as they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from segmenter_fast.benchmarks import tune
from segmenter_fast.benchmarks.ops import OPS, attention

CPU = torch.device("cpu")


class Tiles(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def test_neighbours_are_near_and_within_bounds() -> None:
    shipped = Tiles(16, 64, 4, 3)
    found = tune.neighbours(shipped)
    assert found[0] == shipped
    assert len(set(found)) == len(found)
    assert {t.block_m for t in found} == {16, 32}
    assert {t.block_n for t in found} == {32, 64, 128}
    assert {t.num_warps for t in found} == set(tune.WARPS)


def test_one_part_changes_at_a_time() -> None:
    shipped = (Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2))
    assert all(config[0] == shipped[0] for config in tune.neighbours(shipped, 1))
    assert len({config[1] for config in tune.neighbours(shipped, 1)}) > 20


def test_a_configuration_reaches_the_call_and_goes_again() -> None:
    module: Any = SimpleNamespace(launch_config=lambda length: Tiles(length, 64, 4, 3))
    original = module.launch_config

    def call() -> Tiles:
        return module.launch_config(128)

    assert tune.shipped_config(module, call) == Tiles(128, 64, 4, 3)
    other = Tiles(32, 32, 2, 1)
    assert tune._under(other, module, call)() == other
    assert module.launch_config is original


def test_a_call_that_asks_for_no_configuration_is_an_error() -> None:
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(16, 16, 4, 1), __name__="some_kernel")
    with pytest.raises(RuntimeError, match="some_kernel"):
        tune.shipped_config(module, lambda: None)


def test_wrong_configurations_are_left() -> None:
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(16, 16, 4, 1))

    def call() -> float:
        tiles = module.launch_config()
        if tiles.num_warps == 8:
            raise RuntimeError("out of resources: shared memory")
        return float(tiles.block_m)

    def right(tiles: Tiles) -> bool:
        return tune._is_right(tiles, module, call, lambda out: abs(out - 16), 1e-3)

    assert right(Tiles(16, 16, 4, 1))
    assert not right(Tiles(32, 16, 4, 1))
    assert not right(Tiles(16, 16, 8, 1))


def test_the_search_finds_the_fastest_right_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that reads the time off the configuration: 32 x 128 with 2 warps is best, 2 stages are wrong."""
    module: Any = SimpleNamespace(launch_config=lambda: Tiles(64, 64, 4, 3))
    case = attention._case(CPU, torch.float32, 1, 9, "forward")

    def times(configs: list[Tiles], *_: Any) -> list[float]:
        return [1 + abs(c.block_m - 32) + abs(c.block_n - 128) + c.num_warps + c.num_stages for c in configs]

    monkeypatch.setattr(tune, "_times", times)
    monkeypatch.setattr(tune, "_is_right", lambda config, *_: config.num_stages != 1)
    monkeypatch.setattr(tune, "shipped_config", lambda module, call: module.launch_config())
    row = tune.tune(case, module, float("inf"))
    assert row[0] == str(Tiles(64, 64, 4, 3))
    assert row[2] == str(Tiles(32, 128, 2, 2))
    assert int(row[5]) == 3 * 3 * 3 * 4 - 1


@pytest.mark.parametrize(("op", "pass_"), [("attention", "forward"), ("attention", "backward")])
@pytest.mark.interpret
def test_every_kernel_asks_for_its_configuration(op: str, pass_: str) -> None:
    case = attention._case(CPU, torch.float32, 1, 17, pass_)
    inputs = case.make_inputs(torch.Generator().manual_seed(0))
    module, ours = tune.module_of(case), case.variants["ours"]
    assert not isinstance(ours, str)
    shipped = tune.shipped_config(module, ours.bind(inputs))
    other = next(config for config in tune.neighbours(shipped) if config != shipped)
    assert tune._is_right(other, module, ours.bind(inputs), case.judge(inputs), 1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([next(iter(OPS))]) == 2
    assert "needs a CUDA or ROCm device" in capsys.readouterr().err
