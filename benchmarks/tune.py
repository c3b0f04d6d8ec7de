"""Launch configurations, searched on the GPU at hand: ``python -m segmenter_fast.benchmarks.tune attention``.

A kernel module keeps its configurations as data behind a pure ``launch_config(...)``. For each case this takes what
that function gives, climbs from neighbour to faster neighbour (tiles halved and doubled, other warps and stages) with
the function replaced, and prints the fastest one, to be written into the module by hand. A configuration whose output
is wrong, that does not compile or does not fit is counted and left. What ships is what ``kernels.aot`` compiles: run it
after an edit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .cases import OURS, TOLERANCE, Case, Variant
from .device import describe, resolve
from .ops import OPS
from .timing import Timing, input_sets, measure, own_stream

WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3, 4)
LARGEST = 256
# Candidates timed against each other and the best one so far.
HEAT = 8


def main(arguments: list[str] | None = None) -> int:
    """0; 2 without a CUDA or ROCm device."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.tune", description=__doc__)
    parser.add_argument("op", choices=sorted(OPS))
    parser.add_argument("--cases", type=int, default=4, help="how many of the most valuable cases (%(default)s)")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all cases together (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune needs a CUDA or ROCm device, and PyTorch sees none: nothing was measured", file=sys.stderr)
        return 2
    device = resolve("cuda")
    record = describe(device)
    table = Table("case", "shipped", "ms", "best", "ms", "gain", "tried", "left", title=f"{options.op}, {record.name}")
    chosen = OPS[options.op](device, False)[: options.cases]
    start = time.monotonic()
    for index, case in enumerate(chosen):
        now = time.monotonic()
        with own_stream(device):
            row = tune(case, module_of(case), now + (start + options.budget - now) / (len(chosen) - index))
        table.add_row(case.name, *row)
        Console().print(case.name, *row)
    Console().print(table)
    return 0


def module_of(case: Case) -> ModuleType:
    """The kernel module whose ``launch_config`` the case's pass launches by."""
    name = case.parameters["op"]
    if name == "attention":
        name += f"_{case.parameters['pass']}"
    return importlib.import_module(f"segmenter_fast.kernels.{name}")


def tune(case: Case, module: ModuleType, deadline: float) -> tuple[str, ...]:
    """Search ``case`` until ``deadline``: the cells of its row of the table."""
    inputs = [case.make_inputs(torch.Generator(case.device).manual_seed(0))]
    size = sum(t.nbytes for t in inputs[0] if isinstance(t, torch.Tensor))
    generator = torch.Generator(case.device).manual_seed(1)
    inputs += [case.make_inputs(generator) for _ in range(input_sets(size, case.device) - 1)]
    variant = case.variants[OURS]
    assert isinstance(variant, Variant)
    calls = [variant.bind(arguments) for arguments in inputs]
    judge = case.judge(inputs[0])
    shipped = shipped_config(module, calls[0])
    best, tried, left, waiting = shipped, {shipped}, 0, neighbours(shipped)
    while waiting and time.monotonic() < deadline:
        heat, waiting = waiting[:HEAT], waiting[HEAT:]
        tried.update(heat)
        under = {config: [_under(config, shipped, module, call) for call in calls] for config in (best, *heat)}
        right = [config for config in heat if _is_right(under[config][0], judge, TOLERANCE[case.dtype])]
        left += len(heat) - len(right)
        times = _times({config: under[config] for config in (best, *right)}, case.device)
        fastest = min(times, key=lambda config: times[config])
        if fastest != best:
            best, waiting = fastest, neighbours(fastest)
        waiting = [config for config in waiting if config not in tried]
    final = {config: [_under(config, shipped, module, call) for call in calls] for config in (shipped, best)}
    times = _times(final, case.device)
    gain = times[shipped] / times[best]
    return (
        str(shipped), f"{times[shipped]:.4g}", str(best), f"{times[best]:.4g}", f"{gain:.3f}",
        str(len(tried) - 1), str(left),
    )  # fmt: skip


def shipped_config(module: ModuleType, call: Callable[[], Any]) -> Any:
    """What ``module.launch_config`` returns for ``call``.

    Raises:
        RuntimeError: the call does not ask for a configuration.
    """
    original, seen = module.launch_config, []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with _replaced(module, record):
        call()
    if not seen:
        raise RuntimeError(f"{module.__name__} launched nothing by its launch_config")
    return seen[-1]


def neighbours(config: Any) -> list[Any]:
    """Configurations that differ from ``config`` in one or two fields of one of its parts, the nearest first."""
    found = []
    for part, tiles in enumerate(_parts(config)):
        choices = [_choices(name, value) for name, value in zip(tiles._fields, tiles, strict=True)]
        for values in itertools.product(*choices):
            changes = sum(a != b for a, b in zip(values, tiles, strict=True))
            if changes in (1, 2):
                found.append((changes, _with_part(config, part, type(tiles)(*values))))
    return [other for _, other in sorted(found, key=lambda pair: pair[0])]


def _choices(field: str, value: Any) -> Sequence[Any]:
    if field == "num_warps":
        return WARPS
    if field == "num_stages":
        return STAGES
    return [value, *(size for size in (value // 2, value * 2) if 1 <= size <= LARGEST)]


def _parts(config: Any) -> tuple[Any, ...]:
    """A configuration is one named tuple of tiles, or a plain tuple of them, one for each kernel."""
    return (config,) if hasattr(config, "_fields") else tuple(config)


def _with_part(config: Any, part: int, tiles: Any) -> Any:
    if hasattr(config, "_fields"):
        return tiles
    return (*config[:part], tiles, *config[part + 1 :])


@contextlib.contextmanager
def _replaced(module: ModuleType, launch_config: Callable[..., Any]) -> Iterator[None]:
    original = module.launch_config
    module.launch_config = launch_config  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.launch_config = original  # type: ignore[attr-defined]


def _under(config: Any, shipped: Any, module: ModuleType, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` launched by ``config`` wherever it would be by ``shipped``; its other launches stay as they are."""
    original = module.launch_config

    def choose(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return config if found == shipped else found

    def run() -> Any:
        with _replaced(module, choose):
            return call()

    return run


def _is_right(call: Callable[[], Any], judge: Callable[[Any], float], tolerance: float) -> bool:
    try:
        return judge(call()) <= tolerance
    except Exception:  # a tile that does not compile or does not fit says so in many ways
        return False


def _times(calls: Mapping[Any, Sequence[Callable[[], Any]]], device: torch.device) -> dict[Any, float]:
    """Median milliseconds of each configuration; infinity for one that failed."""
    outcomes = measure({str(config): thunks for config, thunks in calls.items()}, device, seconds=0.1 * len(calls))
    medians = [outcome.median_ms if isinstance(outcome, Timing) else float("inf") for outcome in outcomes.values()]
    return dict(zip(calls, medians, strict=True))


if __name__ == "__main__":
    sys.exit(main())
