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
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from segmenter_fast.devices import choose_device

from .case import OURS, Case, Variant, run_case
from .device import Ceilings, describe
from .ops import OPS
from .runner import make_console, narrow_table, run_command
from .timing import own_stream

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
    console, headings = make_console(), ("case", "shipped", "ms", "best", "ms", "gain", "tried", "skipped")
    table = narrow_table(f"{op}, {describe(device).name}", headings)
    chosen = OPS[op](device, False)[:cases]
    end = time.monotonic() + budget
    for index, case in enumerate(chosen):
        now = time.monotonic()
        row = search(case, kernel_module(case), now + (end - now) / (len(chosen) - index))
        table.add_row(case.name, *row)
        console.print(case.name, *row)
    console.print(table)


def kernel_module(case: Case) -> ModuleType:
    """The kernel module whose ``launch_config`` the case's pass uses."""
    name = case.parameters["op"]
    if name == "attention":
        name += f"_{case.parameters['pass']}"
    return importlib.import_module(f"segmenter_fast.kernels.gpu.{name}")


def search(case: Case, module: ModuleType, deadline: float) -> tuple[str, ...]:
    """Search ``case`` until ``deadline``: the cells of its row of the table."""
    ours = case.variant(OURS)
    with own_stream(case.device):
        inputs = case.make_inputs(torch.Generator(case.device).manual_seed(0))
        judge = case.judge(inputs)
        shipped = shipped_config(module, ours.bind(inputs))

    def times(configs: Sequence[Any]) -> dict[Any, float]:
        """Median milliseconds of the configurations that run and are right."""
        variants: dict[str, Variant | str] = {
            str(c): replace(ours, run=with_config(c, shipped, module, ours.run)) for c in configs
        }
        judged = replace(case, variants=variants, judge=lambda _: judge)
        rows = run_case(judged, Ceilings(0.0, {}), 0.1 * len(configs))
        return {c: row.timing.median_ms for c, row in zip(configs, rows, strict=True) if row.timing}

    best, tried, skipped, waiting = shipped, {shipped}, 0, neighbours(shipped)
    while waiting and time.monotonic() < deadline:
        candidates, waiting = waiting[:ROUND], waiting[ROUND:]
        tried.update(candidates)
        found = times((best, *candidates))
        skipped += 1 + len(candidates) - len(found)
        fastest = min(found, key=lambda config: found[config])
        if fastest != best:
            best, waiting = fastest, neighbours(fastest)
        waiting = [config for config in waiting if config not in tried]
    last = times(list(dict.fromkeys((shipped, best))))
    cells = (str(shipped), f"{last[shipped]:.4g}", str(best), f"{last[best]:.4g}")
    return (*cells, f"{last[shipped] / last[best]:.3f}", str(len(tried) - 1), str(skipped))


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


def with_config(config: Any, shipped: Any, module: ModuleType, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with ``config`` for the launches that would use ``shipped``."""
    original = module.launch_config

    def choose(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return config if found == shipped else found

    def run(*inputs: Any) -> Any:
        with patch.object(module, "launch_config", choose):
            return call(*inputs)

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


if __name__ == "__main__":
    run_command(tune)
