"""Search of launch configurations on the GPU at hand: ``python -m segmenter_fast.benchmarks.tune attention``.

A kernel module keeps its configurations as data behind a pure ``launch_config(...)``. For each case the search starts
at the shipped configuration and climbs from neighbour to faster neighbour (tiles halved and doubled, other warps and
stages) with that function replaced. It prints the fastest configuration, to be written into the module by hand; run
``python -m segmenter_fast.kernels.aot`` after that. A configuration that gives wrong output, does not compile or does
not fit is counted and skipped.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

from segmenter_fast.devices import choose_device

from .case import OURS, TOLERANCE, Case
from .device import describe
from .ops import OPS
from .runner import run_command
from .timing import Timing, measure, own_stream

WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3, 4)
LARGEST = 256
# Candidates that are timed together with the best configuration so far.
ROUND = 8


def tune(
    op: str,
    cases: Annotated[int, typer.Option(help="Number of the most valuable cases.")] = 4,
    budget: Annotated[float, typer.Option(help="Seconds for all cases together.")] = 480,
) -> None:
    """Search the launch configurations of an op on the GPU at hand."""
    if op not in OPS:
        raise ValueError(f"unknown op {op}; known are {', '.join(OPS)}")
    device = choose_device("cuda")
    headings = ("case", "shipped", "ms", "best", "ms", "gain", "tried", "skipped")
    table = Table(*headings, title=f"{op}, {describe(device).name}")
    chosen = OPS[op](device, False)[:cases]
    end = time.monotonic() + budget
    for index, case in enumerate(chosen):
        now = time.monotonic()
        with own_stream(device):
            row = search(case, kernel_module(case), now + (end - now) / (len(chosen) - index))
        table.add_row(case.name, *row)
        Console().print(case.name, *row)
    Console().print(table)


def kernel_module(case: Case) -> ModuleType:
    """The kernel module whose ``launch_config`` the case's pass uses."""
    name = case.parameters["op"]
    if name == "attention":
        name += f"_{case.parameters['pass']}"
    return importlib.import_module(f"segmenter_fast.kernels.gpu.{name}")


def search(case: Case, module: ModuleType, deadline: float) -> tuple[str, ...]:
    """Search ``case`` until ``deadline``: the cells of its row of the table."""
    generator = torch.Generator(case.device).manual_seed(0)
    inputs = case.input_sets(case.make_inputs(generator), generator)
    calls = [case.variant(OURS).bind(arguments) for arguments in inputs]
    judge = case.judge(inputs[0])
    shipped = shipped_config(module, calls[0])
    best, tried, skipped, waiting = shipped, {shipped}, 0, neighbours(shipped)

    def launched_by(configs: Sequence[Any]) -> dict[Any, list[Callable[[], Any]]]:
        return {config: [with_config(config, shipped, module, call) for call in calls] for config in configs}

    while waiting and time.monotonic() < deadline:
        candidates, waiting = waiting[:ROUND], waiting[ROUND:]
        tried.update(candidates)
        launched = launched_by((best, *candidates))
        right = [config for config in candidates if is_right(launched[config][0], judge, TOLERANCE[case.dtype])]
        skipped += len(candidates) - len(right)
        times = median_times({config: launched[config] for config in (best, *right)}, case.device)
        fastest = min(times, key=lambda config: times[config])
        if fastest != best:
            best, waiting = fastest, neighbours(fastest)
        waiting = [config for config in waiting if config not in tried]
    times = median_times(launched_by((shipped, best)), case.device)
    cells = (str(shipped), f"{times[shipped]:.4g}", str(best), f"{times[best]:.4g}")
    return (*cells, f"{times[shipped] / times[best]:.3f}", str(len(tried) - 1), str(skipped))


def shipped_config(module: ModuleType, call: Callable[[], Any]) -> Any:
    """The last configuration that ``module.launch_config`` returns during ``call``.

    Raises:
        RuntimeError: the call does not ask for a configuration.
    """
    original, seen = module.launch_config, []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with patch.object(module, "launch_config", record):
        call()
    if not seen:
        raise RuntimeError(f"{module.__name__} launched nothing by its launch_config")
    return seen[-1]


def with_config(config: Any, shipped: Any, module: ModuleType, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` with ``config`` for the launches that would use ``shipped``."""
    original = module.launch_config

    def choose(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return config if found == shipped else found

    def run() -> Any:
        with patch.object(module, "launch_config", choose):
            return call()

    return run


def neighbours(config: Any) -> list[Any]:
    """Configurations that differ from ``config`` in one or two fields of one of its parts, the nearest first.

    A configuration is a named tuple of tiles, or a plain tuple of these with one for each kernel.
    """
    single = hasattr(config, "_fields")
    found = []
    for part, tiles in enumerate((config,) if single else config):
        choices = [
            {"num_warps": WARPS, "num_stages": STAGES}.get(field)
            or (value, *(size for size in (value // 2, value * 2) if 1 <= size <= LARGEST))
            for field, value in zip(tiles._fields, tiles, strict=True)
        ]
        for values in itertools.product(*choices):
            changes = sum(a != b for a, b in zip(values, tiles, strict=True))
            if changes in (1, 2):
                new = type(tiles)(*values)
                found.append((changes, new if single else (*config[:part], new, *config[part + 1 :])))
    return [other for _, other in sorted(found, key=lambda pair: pair[0])]


def is_right(call: Callable[[], Any], judge: Callable[[Any], float], tolerance: float) -> bool:
    try:
        return judge(call()) <= tolerance
    except Exception:  # a tile that does not compile or does not fit may raise anything
        return False


def median_times(calls: Mapping[Any, Sequence[Callable[[], Any]]], device: torch.device) -> dict[Any, float]:
    """Median milliseconds of each configuration; infinity for one that failed."""
    outcomes = measure({str(config): variant for config, variant in calls.items()}, device, seconds=0.1 * len(calls))
    medians = [outcome.median_ms if isinstance(outcome, Timing) else float("inf") for outcome in outcomes.values()]
    return dict(zip(calls, medians, strict=True))


if __name__ == "__main__":
    run_command(tune)
