"""Where the time of our model goes: ``python -m segmenter_fast.benchmarks.profiler``.

``torch.profiler`` over a few inferences and a few training steps. The kernels that take the most time (on a CPU the
operators) are printed and written to ``<out>/<device>/profile.json``. Labels have to be the argmax of our own logits,
and loss and gradients those of the reference, or nothing is profiled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from segmenter_fast import Segmenter

from .cases import OURS, TOLERANCE, Variant
from .device import describe, name_of, resolve
from .results import write_json
from .run import add_options
from .training import MODELS, Point, make_case, training_dtype

CALLS = 5
SCHEMA = 1


@dataclass(frozen=True)
class Kernel:
    """One kernel, or operator of a CPU: milliseconds and launches per call, and its share of the call's busy time."""

    name: str
    ms: float
    launches: float
    share: float


@dataclass(frozen=True)
class Profile:
    """``busy_ms`` is the time of all kernels of a call, ``kernels`` the longest of them."""

    name: str
    busy_ms: float
    kernels: list[Kernel]


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where an output was wrong, so that nothing was written."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.profiler", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="b", help="size of the model (%(default)s)")
    parser.add_argument("--patch", type=int, default=16, help="patch size (%(default)s)")
    parser.add_argument("--classes", type=int, default=150, help="number of classes (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (%(default)s)")
    parser.add_argument("--batch", type=int, help="images a call (8; on a CPU 1)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--no-compile", action="store_true", help="profile both without torch.compile")
    parser.add_argument("--top", type=int, default=25, help="how many kernels (%(default)s)")
    add_options(parser, timed=False)
    options = parser.parse_args(arguments)
    try:
        device = resolve(options.device)
        dtype = training_dtype(options.dtype, device)
        batch = (8 if device.type == "cuda" else 1) if options.batch is None else options.batch
        point = Point(options.model, options.patch, options.classes, options.size, batch)
        calls = {
            "inference": inference(point, device, dtype, not options.no_compile),
            "training step": training_step(point, device, dtype, not options.no_compile),
        }
    except ValueError as error:
        parser.error(str(error))
    except ArithmeticError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    record = describe(device)
    profiles = [take(name, call, device, options.top) for name, call in calls.items()]
    content = {
        "schema": SCHEMA,
        "device": asdict(record),
        "parameters": {**vars(point), "dtype": name_of(dtype), "compiled": not options.no_compile},
        "profiles": [asdict(found) for found in profiles],
    }
    console = Console()
    if not console.is_terminal:
        console.width = 140
    for found in profiles:
        console.print(table(found))
    console.print(f"wrote {write_json(content, options.out / record.slug / 'profile.json')}")
    return 0


def inference(point: Point, device: torch.device, dtype: torch.dtype, compiled: bool) -> Callable[[], Any]:
    """A call that labels a batch; without a CUDA graph, whose kernels would have no names of ours around them.

    Raises:
        ArithmeticError: labels that are not the argmax of the logits.
    """
    torch.manual_seed(0)
    model = Segmenter(point.config).to(device).optimize(dtype, compile=compiled, cuda_graph=False)
    images = torch.randn(point.batch, 3, point.size, point.size, device=device).to(dtype)
    plain = Segmenter(point.config).to(device).optimize(dtype, compile=False, cuda_graph=False)
    plain.load_state_dict(model.state_dict())
    equal = (model.segment(images) == plain(images).argmax(1)).float().mean().item()
    if not equal >= (0.999 if dtype is torch.float32 or not compiled else 0.95):
        raise ArithmeticError(f"inference: only {equal:.2%} of the labels are the argmax of the logits")
    return lambda: model.segment(images)


def training_step(point: Point, device: torch.device, dtype: torch.dtype, compiled: bool) -> Callable[[], Any]:
    """A call that takes a training step.

    Raises:
        ArithmeticError: a loss or gradients that are not the reference's.
    """
    case = make_case(device, dtype, point)
    inputs = case.make_inputs(torch.Generator(device).manual_seed(0))
    step = case.variants[f"{OURS} compiled" if compiled else OURS]
    assert isinstance(step, Variant)
    call = step.bind(inputs)
    error = case.judge(inputs)(call())
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"training step: error {error:.2g}, allowed {TOLERANCE[dtype]:.2g}")
    return call


def take(name: str, call: Callable[[], Any], device: torch.device, top: int) -> Profile:
    """Profile ``CALLS`` calls after a warm-up."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    call()
    with profile(activities=activities) as profiler:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    times = {}
    for event in profiler.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if on_device == cuda and microseconds > 0:
            times[event.key] = (microseconds / CALLS / 1e3, event.count / CALLS)
    busy = sum(ms for ms, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    return Profile(name, busy, [Kernel(key, ms, launches, ms / busy) for key, (ms, launches) in longest])


def table(found: Profile) -> Table:
    """The kernels of a profile, the longest first."""
    result = Table(title=f"{found.name}: {found.busy_ms:.4g} ms of kernels a call", title_justify="left")
    result.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=90)
    for heading in ("ms", "launches", "share"):
        result.add_column(heading, justify="right")
    for kernel in found.kernels:
        result.add_row(kernel.name, f"{kernel.ms:.4g}", f"{kernel.launches:g}", f"{kernel.share:.1%}")
    return result


if __name__ == "__main__":
    sys.exit(main())
