"""Compilation ahead, in parallel: ``python -m segmenter_fast.benchmarks.warm --device cuda``.

Each process compiles one thing that a benchmark is going to time, runs it once and times nothing. The caches of PyTorch
and Triton on disk keep the programs, so that the benchmarks spend their time on the device. Where other processes use
the device meanwhile, remove the ``*.best_config`` files of TORCHINDUCTOR_CACHE_DIR: choices by a disturbed clock.
"""

from __future__ import annotations

import time
from functools import partial
from multiprocessing import get_context
from typing import Annotated, NamedTuple

import torch
import typer

from segmenter_fast.devices import choose_device, choose_dtype, usable_cores

from .case import OURS, Case
from .models.comparison import PEER, Comparison
from .models.peers import ModelCase
from .ops import FIRST, OPS
from .runner import run_command
from .timing import own_stream
from .training import OP as TRAINING
from .training import choose_steps, step_case, training_dtype

VARIANTS = (*(f"seg_{size}_mask_16" for size in "bstl"), "seg_b_mask_8")
BATCHES = (1, 32)


class Task(NamedTuple):
    """Something to compile: a training step or the case ``number`` of an op, or a model at batch ``number``."""

    name: str
    number: int
    variants: tuple[str, ...]


def tasks() -> list[Task]:
    """Everything that ``gpu.sh`` compiles with PyTorch, the slowest and most valuable first."""
    steps = [Task(TRAINING, 0, (name,)) for name in (f"{OURS} compiled", "compile")]
    models = [Task(variant, batch, (OURS, PEER)) for variant in VARIANTS for batch in BATCHES]
    ops = [Task(op, number, ("compile", OURS)) for number in range(FIRST) for op in OPS]
    return steps + models[: len(BATCHES)] + ops + [Task(VARIANTS[0], 8, (OURS,))] + models[len(BATCHES) :]


def build(device: torch.device, task: Task) -> str:
    """Compile and run the variants of a task once; return what was done, in words."""
    torch._inductor.config.compile_threads = 1  # the other cores have tasks of their own
    start = time.monotonic()
    try:
        with own_stream(device):
            if task.name == TRAINING or task.name in OPS:
                _run_case(case_of(device, task), task)
            else:
                _run_model(ModelCase(task.name, choose_dtype("auto", device), batch=task.number), device, task)
    except Exception as error:  # the benchmark itself reports it with its variant
        return f"{task}: {type(error).__name__}: {error}"
    return f"{task}: {time.monotonic() - start:.0f} s"


def case_of(device: torch.device, task: Task) -> Case:
    if task.name == TRAINING:
        return step_case(device, training_dtype("auto", device), choose_steps(device, False)[task.number])
    return OPS[task.name](device, False)[task.number]


def _run_case(case: Case, task: Task) -> None:
    inputs = case.make_inputs(torch.Generator(case.device).manual_seed(0))
    for name in task.variants:
        if name in case.variants:
            case.variant(name).bind(inputs)()


@torch.inference_mode()
def _run_model(case: ModelCase, device: torch.device, task: Task) -> None:
    makers = Comparison(case, device, runtimes=()).makers()
    for name in task.variants:
        make = makers[name]
        assert not isinstance(make, str)
        make()()


def warm(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one for two cores.")] = None,
) -> None:
    """Compile everything that gpu.sh times, one thing a process; print what is done."""
    count = processes or max(1, usable_cores() // 2)
    with get_context("spawn").Pool(count, maxtasksperchild=1) as pool:
        for done in pool.imap_unordered(partial(build, choose_device(device)), tasks(), chunksize=1):
            print(done, flush=True)


if __name__ == "__main__":
    run_command(warm)
