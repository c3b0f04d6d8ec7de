"""Calibration of the static bounds on the GPU at hand: ``python -m segmenter_fast.benchmarks.tune attention``.

A kernel module keeps its configurations as data behind a pure ``launch_config(...)``. For each case the shipped
configuration and its neighbours (a tile halved or doubled, other warps or stages) are compiled in parallel processes
and ranked by their static bound (``kernels/costs``), and the best of them timed with that function replaced. A table
shows the factor between time and bound and their rank correlation: where it is low, believe the clock. The fastest
configuration is to be written into the module by hand; run ``python -m segmenter_fast.kernels.aot`` after that. A
configuration that gives wrong output, does not compile or does not fit is counted and skipped.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from types import ModuleType
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from segmenter_fast.devices import choose_device, usable_cores

from .case import OURS, Case, Variant, run_case
from .deadline import deadline_after
from .device import Ceilings, describe
from .ops import OPS
from .runner import make_console, narrow_table, run_command
from .timing import own_stream

WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3, 4)
LARGEST = 256


def tune(
    ops: Annotated[list[str], typer.Argument(metavar="OP...")],
    cases: Annotated[int, typer.Option(min=1, help="Number of the most valuable cases.")] = 4,
    configurations: Annotated[int, typer.Option(min=2, help="Number of configurations to time for a case.")] = 8,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds; no case begins after them.")] = None,
) -> None:
    """Time the configurations of ops that the static bounds rank first, on the GPU at hand; the ops take turns."""
    if unknown := sorted(set(ops) - set(OPS)):
        raise ValueError(f"unknown ops {', '.join(unknown)}; known are {', '.join(OPS)}")
    device, deadline = choose_device("cuda"), deadline_after(budget)
    headings = ("case", "shipped", "ms", "bound", "best", "ms", "gain", "factor", "rank", "timed", "skipped")
    console, table = make_console(), narrow_table(f"{', '.join(ops)}, {describe(device).name}", headings)
    with get_context("spawn").Pool(max(1, usable_cores() - 2)) as pool:
        for number in range(cases):
            if time.monotonic() > deadline:
                console.print(f"{cases - number} of {cases} cases of each op not run, the time is used up")
                break
            chosen = [(op, found[number]) for op in ops if len(found := OPS[op](device, False)) > number]
            shipped = [shipped_of(case) for _, case in chosen]
            # All builds of a round at once, and only then a clock, which they would disturb.
            work = [
                [(op, number, config, own) for config in (own, *neighbours(own))]
                for (op, _), own in zip(chosen, shipped, strict=True)
            ]
            bounds = iter(pool.starmap(build, itertools.chain(*work), chunksize=1))
            for (_, case), own, tasks in zip(chosen, shipped, work, strict=True):
                counted = {config: next(bounds) for _, _, config, _ in tasks}
                row = calibrate(case, own, counted, configurations)
                table.add_row(case.name, *row)
                console.print(case.name, *row)
    console.print(table)
    console.print("bound: static bound of the shipped configuration, ms; factor: median of time over bound;")
    console.print("rank: correlation of the ranks of times and bounds (Spearman)")


@lru_cache(maxsize=1)
def _case(op: str, number: int) -> tuple[Case, tuple[Any, ...]]:
    """A case of an op on the GPU at hand, and its inputs."""
    case = OPS[op](choose_device("cuda"), False)[number]
    return case, case.make_inputs(torch.Generator(case.device).manual_seed(0))


def build(op: str, number: int, config: Any, shipped: Any) -> float | None:
    """The static bound of a configuration, NaN where it cannot be counted; None where the configuration cannot run.

    Its kernels are then in Triton's cache.
    """
    case, inputs = _case(op, number)
    ours = case.variant(OURS)
    call = replace(ours, run=with_config(config, shipped, kernel_module(case), ours.run)).bind(inputs)
    bound = static_bound(call)
    try:
        call()
        torch.cuda.synchronize()
    except Exception:  # a tile may fit into no multiprocessor
        return None
    return math.nan if bound is None else bound


def kernel_module(case: Case) -> ModuleType:
    """The kernel module whose ``launch_config`` the case's pass uses."""
    name = case.parameters["op"]
    if name == "attention":
        name += f"_{case.parameters['pass']}"
    elif name == "upsample_softmax" and case.parameters["pass"] != "forward":
        name += "_backward"
    return importlib.import_module(f"segmenter_fast.kernels.gpu.{name}")


def shipped_of(case: Case) -> Any:
    """The shipped configuration of a case."""
    with own_stream(case.device):
        inputs = case.make_inputs(torch.Generator(case.device).manual_seed(0))
        return shipped_config(kernel_module(case), case.variant(OURS).bind(inputs))


def calibrate(case: Case, shipped: Any, counted: dict[Any, float | None], configurations: int) -> tuple[str, ...]:
    """Time the best ``configurations`` by static bound, the shipped one among them: the cells of a row of the table.

    ``counted`` has what ``build`` found of each configuration.
    """
    ours, module = case.variant(OURS), kernel_module(case)
    bounds = {config: bound for config, bound in counted.items() if bound is not None}
    ranked = sorted(bounds, key=lambda config: (math.isnan(bounds[config]), bounds[config]))
    chosen = list(dict.fromkeys((shipped, *ranked)))[:configurations]
    variants: dict[str, Variant | str] = {
        str(config): replace(ours, run=with_config(config, shipped, module, ours.run)) for config in chosen
    }
    rows = run_case(replace(case, variants=variants), Ceilings(0.0, {}), 0.1 * len(chosen))
    times = {config: row.timing.median_ms for config, row in zip(chosen, rows, strict=True) if row.timing}
    if shipped not in times:
        return (str(shipped), rows[0].status, *[""] * 6, str(len(times)), rows[0].note)
    best = min(times, key=lambda config: times[config])
    both = [config for config in times if not math.isnan(bounds.get(config, math.nan))]
    factor = statistics.median(times[config] / bounds[config] for config in both) if both else math.nan
    rank = spearman([bounds[config] for config in both], [times[config] for config in both])
    cells = (
        str(shipped),
        f"{times[shipped]:.4g}",
        f"{bounds.get(shipped, math.nan):.4g}",
        str(best),
        f"{times[best]:.4g}",
    )
    skipped = len(counted) - len(bounds) + len(chosen) - len(times)
    return (
        *cells,
        f"{times[shipped] / times[best]:.3f}",
        f"{factor:.3g}",
        f"{rank:.2f}",
        str(len(times)),
        str(skipped),
    )


def static_bound(call: Callable[[], object]) -> float | None:
    """Milliseconds in which the launches of ``call`` can be issued on an H100; None where they cannot be counted."""
    from triton.errors import TritonError

    from segmenter_fast.kernels import costs
    from segmenter_fast.kernels.gpu.launches import bind

    try:
        found = [costs.cost(launch, {}) for launch in bind(costs.TARGET, iter([("", call)]))]
    except (RuntimeError, LookupError, TritonError):
        return None
    return 1e-3 * sum(max(one["us"].values()) for one in found)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks of two sequences; equal values share a rank. NaN where one of them is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum((other < value) + (other == value) / 2 for other in values) for value in values]

    try:
        return statistics.correlation(ranks(first), ranks(second))
    except statistics.StatisticsError:
        return math.nan


def shipped_config(module: ModuleType, call: Callable[[], Any]) -> Any:
    """The last configuration that ``module.launch_config`` returns during ``call``.

    Raises:
        RuntimeError: the call does not ask for a configuration.
    """
    original, seen = module.launch_config, []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with replaced(module, record):
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
        with replaced(module, choose):
            return call(*inputs)

    return run


@contextmanager
def replaced(module: ModuleType, launch_config: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.launch_config``, also where the module keeps what it has computed from it."""
    kept = [value for value in vars(module).values() if hasattr(value, "cache_clear")]
    try:
        with patch.object(module, "launch_config", launch_config):
            for function in kept:
                function.cache_clear()
            yield
    finally:
        for function in kept:
            function.cache_clear()


def neighbours(config: Any) -> list[Any]:
    """Configurations that differ from ``config`` in one field of one of its parts.

    A configuration is a named tuple of tiles, or a plain tuple of these with one for each kernel.
    """
    single = hasattr(config, "_fields")
    found = []
    for part, tiles in enumerate((config,) if single else config):
        for field, value in tiles._asdict().items():
            sizes = (size for size in (value // 2, value * 2) if 1 <= size <= LARGEST)
            for other in {"num_warps": WARPS, "num_stages": STAGES}.get(field, sizes):
                if other != value:
                    new = tiles._replace(**{field: other})
                    found.append(new if single else (*config[:part], new, *config[part + 1 :]))
    return found


if __name__ == "__main__":
    run_command(tune)
