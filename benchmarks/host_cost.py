"""Host cost of fused operators and whole models, launches stubbed: ``python -m segmenter_fast.benchmarks.host_cost``.

Small CPU tensors go through the dispatcher to the Triton backends, but no kernel runs. ``ours`` stops where Triton's
launch begins. ``with binder`` also binds and specialises the arguments and looks the kernel up, as Triton does, and
lacks the driver's launch alone. A plain custom operator of the same run tells how fast the machine is.

Whole models are measured on a GPU where there is one, at 512 x 512, each call after the one before has finished.
Without one the layers are those of S/16, with 16 channels and few pixels; CUDA graphs do nothing when replayed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import segmenter_fast as sf
from segmenter_fast.inference_segmenter import InferenceSegmenter
from segmenter_fast.kernels.registry import FUSED, INTERPRET

from .runner import make_console, narrow_table, run_command

CALLS = 1000


class HostCost(NamedTuple):
    """Microseconds of a call, medians, beside those of a plain custom operator; ``launches`` of a call."""

    plain: float
    ours: float
    with_binder: float
    launches: int


def operators() -> dict[str, Callable[[], object]]:
    """A call of each operator with small tensors."""
    ops, bf16 = torch.ops.segmenter_fast, partial(torch.zeros, dtype=torch.bfloat16)
    masks, size = bf16(1, 4, 4, 150).permute(0, 3, 1, 2), [64, 64]
    target, probabilities = torch.zeros(1, *size, dtype=torch.int64), bf16(1, 150, *size)
    qkv, out, lse = bf16(1, 65, 3, 4, 64), bf16(1, 65, 4, 64), torch.zeros(1, 4, 65)
    # In float32, because the backward multiplies small matrices, which is slow in a CPU's bfloat16.
    patches, classes, norm, grad = (torch.zeros(shape) for shape in ((1, 16, 16), (1, 19, 16), (19,), (1, 16, 19)))
    loss = partial(ops.upsample_cross_entropy, masks, target, size, 255, None, 0.0, "mean", False)
    return {
        "upsample_argmax": partial(ops.upsample_argmax, masks, size, size, False),
        "upsample_softmax": partial(ops.upsample_softmax, masks, size, size, False),
        "upsample_softmax_backward": partial(
            ops.upsample_softmax_backward, probabilities, probabilities, [4, 4], size, False
        ),
        "upsample_cross_entropy": partial(loss, False),
        "upsample_cross_entropy, gradient": partial(loss, True),
        "attention": partial(ops.attention, qkv, 0.125, True),
        "attention_backward": partial(ops.attention_backward, out, qkv, out, lse, 0.125),
        "mask_scores": partial(ops.mask_scores, patches, classes, norm, norm, 1e-5),
        "mask_scores_backward": partial(ops.mask_scores_backward, grad, patches, classes, norm, norm, 1e-5),
    }


def median_us(*calls: Callable[[], object]) -> list[float]:
    """Median of CALLS calls each, in microseconds; they take turns, and each is timed, so that few are disturbed."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(CALLS):
        for call, own in zip(calls, samples, strict=True):
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [1e6 * statistics.median(own) for own in samples]


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Send CPU tensors to the Triton backends inside the block.

    Raises:
        ValueError: kernels are interpreted, so that there is no launch to stub.
    """
    if INTERPRET:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted and not launched; unset it")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from segmenter_fast.kernels.gpu.launches import stand_in

    active = stand_in(GPUTarget("cuda", 90, 32))
    active.get_current_device = lambda: "host cost"  # a cache of its own
    with warnings.catch_warnings(), torch.library._scoped_library("segmenter_fast", "IMPL") as backends:
        warnings.simplefilter("ignore")  # that the CPU's own kernels stand back
        for name, function in FUSED.items():
            backends.impl(name, function, "CPU", allow_override=True)
        driver.set_active(active)
        try:
            yield
        finally:
            driver.set_active(None)


def _build(kernel: Any, key: Any, signature: Any, device: Any, *others: Any) -> Any:
    """Stand for a compiled kernel, whose launch does nothing."""
    nothing = SimpleNamespace(launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None)
    kernel.device_caches[device][0][key] = nothing
    return nothing


@torch.no_grad()
def measure() -> dict[str, HostCost]:
    """Host costs of each fused operator.

    Raises:
        ValueError: kernels are interpreted, so that there is no launch to stub.
    """
    launches = 0

    def skip(kernel: Any, *args: Any, **arguments: Any) -> None:
        nonlocal launches
        launches += 1

    found = {}
    with on_the_cpu(), torch.library._scoped_library("host_cost", "DEF") as other:
        from triton.runtime.jit import JITFunction

        other.define("plain(Tensor tensor) -> Tensor")
        other.impl("plain", lambda tensor: tensor.new_empty((16,)), "CPU")
        plain = partial(torch.ops.host_cost.plain, torch.zeros(16))
        for name, call in operators().items():
            with patch.object(JITFunction, "run", skip):
                launches = 0
                call()
                once, (base, ours) = launches, median_us(plain, call)
            with patch.object(JITFunction, "_do_compile", _build):
                call()
                found[name] = HostCost(base, ours, median_us(call)[0], once)
    return found


@torch.no_grad()
def measure_models() -> dict[str, float]:
    """Microseconds of ``segment`` on one image: a replayed graph, and S/16 without graphs or compiler.

    ``torch.zeros`` on the CPU tells how fast the machine is.

    Raises:
        ValueError: kernels are interpreted, and there is no GPU.
    """
    gpu = torch.cuda.is_available()
    small: dict[str, Any] = {} if gpu else {"image_size": 16, "embed_dim": 16, "num_heads": 1, "decoder_num_heads": 1}
    model = sf.create_model("seg_s_mask_16", **small).eval().to("cuda" if gpu else "cpu")
    images = torch.zeros(1, 3, *model.config.image_size, device="cuda" if gpu else "cpu")
    threads = torch.get_num_threads()
    with ExitStack() as stubs:
        if not gpu:
            stubs.enter_context(on_the_cpu())
            from triton.runtime.jit import JITFunction

            stream, skip = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None), lambda *_: None
            parts: dict[str, Any] = {"CUDAGraph": lambda: SimpleNamespace(replay=skip), "graph_pool_handle": skip}
            parts |= {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext}
            parts |= {"graph": lambda *_, **__: nullcontext(), "Event": lambda: SimpleNamespace(record=skip)}
            stubs.enter_context(patch.multiple(torch.cuda, **parts))
            stubs.enter_context(patch.object(JITFunction, "_do_compile", _build))
            stubs.enter_context(patch.object(InferenceSegmenter, "_captures", lambda *_: True))
            stubs.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)
        replayed = partial(model.optimize(torch.float32, compile=False).segment, images)
        eager = partial(model.segment, images)
        for call in (replayed, eager):
            call()
        plain = partial(torch.zeros, 16)
        (once, replay), (again, launched) = (median_us(plain, call) for call in (replayed, eager))
        return {"torch.zeros": max(once, again), "replay of a graph": replay, "S/16 without graphs": launched}


def main() -> None:
    """Print the host cost of every fused operator, launches stubbed, and of whole models."""
    table = narrow_table("host cost of a call, us", ("operator", "launches", "plain operator", "ours", "with binder"))
    for name, cost in measure().items():
        table.add_row(name, str(cost.launches), f"{cost.plain:.1f}", f"{cost.ours:.1f}", f"{cost.with_binder:.1f}")
    make_console().print(table)
    table = narrow_table("host cost of segment, us", ("call", "median"))
    for call, microseconds in measure_models().items():
        table.add_row(call, f"{microseconds:.1f}")
    make_console().print(table)


if __name__ == "__main__":
    run_command(main)
