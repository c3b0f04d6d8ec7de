"""Profile of our model: the kernels (on a CPU the operators) that take the time of an inference and a training step.

``python -m segmenter_fast.benchmarks.profiler`` prints PyTorch's tables and writes ``<out>/<device>/profile.txt``.
Nothing is profiled unless labels are the argmax of our own logits, and loss and gradients those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from segmenter_fast import Segmenter
from segmenter_fast.devices import choose_device
from segmenter_fast.io.atomic import atomic_path

from .case import OURS, check_variant
from .device import describe, name_of
from .results import RESULTS
from .runner import run_command
from .training import StepShape, step_case, training_dtype

CALLS, LONGEST = 5, 25


def profile(
    model: Annotated[str, typer.Option(help="Size of the model: t, s, b or l.")] = "b",
    patch: Annotated[int, typer.Option(help="Patch size.")] = 16,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 150,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 512,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a call; default 8, on a CPU 1.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Profile the compiled forms.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder of the results; each device has its own below.")] = RESULTS,
) -> None:
    """Print the kernels that take the most time and write profile.txt."""
    place = choose_device(device)
    kind = training_dtype(dtype, place)
    step = StepShape(model, patch, classes, size, batch or (8 if place.type == "cuda" else 1))
    calls = {
        "inference": _inference(step, place, kind, compile),
        "training step": _training_step(step, place, kind, compile),
    }
    record = describe(place)
    settings = f"{step}, {name_of(kind)}, compiled {compile}"
    parts = [f"{record.name}, PyTorch {record.torch}, commit {record.commit}\n{settings}"]
    parts += [f"{name}, {CALLS} calls\n{_table(call, place)}" for name, call in calls.items()]
    text = "\n\n".join(parts)
    print(text)
    with atomic_path(out / record.slug / "profile.txt") as path:
        path.write_text(f"{text}\n")


def _inference(step: StepShape, device: torch.device, dtype: torch.dtype, compile: bool) -> Callable[[], Any]:
    """A call that labels a batch, without a CUDA graph, which would hide the operators around its kernels."""
    torch.manual_seed(0)
    model = Segmenter(step.config).to(device)
    images = torch.randn(step.batch, 3, step.size, step.size, device=device).to(dtype)
    logits = model.optimize(dtype, compile=False, cuda_graph=False)(images)
    fast = model.optimize(dtype, compile=compile, cuda_graph=False)
    equal = (fast.segment(images) == logits.argmax(1)).float().mean().item()
    if not equal >= (0.999 if dtype is torch.float32 or not compile else 0.95):
        raise ValueError(f"inference is wrong: only {equal:.2%} of the labels are the argmax of the logits")
    return lambda: fast.segment(images)


def _training_step(step: StepShape, device: torch.device, dtype: torch.dtype, compile: bool) -> Callable[[], Any]:
    case = step_case(device, dtype, step)
    inputs = case.make_inputs(torch.Generator(device).manual_seed(0))
    name = f"{OURS} compiled" if compile else OURS
    row = check_variant(case, name, inputs, case.judge(inputs))
    if row.status != "ok":
        raise ValueError(f"training step is wrong: {row.status}: {row.note}")
    return case.variant(name).bind(inputs)


def _table(call: Callable[[], Any], device: torch.device) -> str:
    """PyTorch's table of the longest kernels in CALLS calls after a warm-up."""
    cuda = device.type == "cuda"
    call()
    with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=LONGEST, max_name_column_width=60).strip()


if __name__ == "__main__":
    run_command(profile)
