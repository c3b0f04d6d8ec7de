"""One case of a benchmark: its inputs, the variants that compute it, and the judge of their outputs.

``run_case`` times a variant only after the judge has accepted its output. A peer that is absent, fails or disagrees
becomes a row that says so. If our own output is wrong, the whole case is refused and has no rows.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .deadline import OutOfTimeError, time_limit
from .device import Ceilings, name_of
from .timing import Failure, Timing, available_memory, input_sets, measure, own_stream, release

OURS = "ours"
# Largest accepted error of an output, relative to the largest value of the float64 oracle. It tells a wrong result from
# a rounded one, since peers round as they like; the tests hold far tighter bounds.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Measured: matrix products in TFLOP/s, a copy in GB/s.
Rates = tuple[float | None, float | None]


class DisagreementError(Exception):
    """Our own output is wrong, so no figure of the case may be reported."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the case: ``run(*prepare(*inputs))``, of which only ``run`` is timed.

    ``needs_bytes`` is a lower bound of what it allocates. A CPU variant that cannot fit is not started, because Linux
    kills a process that runs out of memory. A ``late`` variant takes so long to compile that the cases first run
    without it.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] | None = None
    needs_bytes: int = 0
    late: bool = False

    def bind(self, inputs: tuple[Any, ...]) -> Callable[[], Any]:
        arguments = self.prepare(*inputs) if self.prepare else inputs
        return lambda: self.run(*arguments)


@dataclass(frozen=True)
class Case:
    """One comparison. ``variants`` maps a name to a Variant, or to the reason why it is absent.

    ``judge(inputs)`` returns a function from an output to its error. ``bytes_moved`` and ``flops`` (of matrix products)
    are the least that any implementation needs, 0 where they are not counted. ``images`` is the batch of a whole model.
    """

    parameters: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    make_inputs: Callable[[torch.Generator], tuple[Any, ...]]
    judge: Callable[[tuple[Any, ...]], Callable[[Any], float]]
    variants: dict[str, Variant | str]
    bytes_moved: int = 0
    flops: int = 0
    images: int = 0

    @property
    def name(self) -> str:
        return ", ".join(f"{v}" if isinstance(v, str) else f"{k} {v}" for k, v in self.parameters.items())

    def early(self) -> Case:
        """The case without its late variants."""
        late = [name for name, variant in self.variants.items() if isinstance(variant, Variant) and variant.late]
        return replace(self, variants={name: v for name, v in self.variants.items() if name not in late})

    def variant(self, name: str) -> Variant:
        variant = self.variants[name]
        assert isinstance(variant, Variant)
        return variant


@dataclass(frozen=True)
class Row:
    """The result of one variant. ``status`` is ok, absent, out of memory, failed, disagrees, refused or not run.

    Only rows that are ok have figures. ``error`` is the judge's; for a whole model it is that of the logits, and
    ``labels`` is the share of labels equal to the reference's. ``gb_s`` counts the least bytes, ``tflops`` the counted
    FLOPs. ``share`` is the fraction of the measured matrix-product rate, or without FLOPs of the copy bandwidth.
    """

    variant: str
    status: str
    note: str = ""
    error: float | None = None
    timing: Timing | None = None
    gb_s: float | None = None
    tflops: float | None = None
    share: float | None = None
    images_s: float | None = None
    labels: float | None = None

    @classmethod
    def failed(cls, variant: str, reason: BaseException | Failure, where: str = "") -> Row:
        failure = reason if isinstance(reason, Failure) else Failure.of(reason)
        return cls(variant, failure.status, where + failure.note)

    def timed(
        self, outcome: Timing | Failure, images: int, flops: int = 0, bytes_moved: int = 0, rates: Rates = (None, None)
    ) -> Row:
        """This row with the figures of ``outcome``, or with the reason why there are none."""
        if isinstance(outcome, Failure):
            return Row.failed(self.variant, outcome)
        ms = outcome.median_ms
        gb_s = bytes_moved / ms / 1e6 if bytes_moved else None
        tflops = flops / ms / 1e9 if flops else None
        rate, ceiling = (tflops, rates[0]) if tflops else (gb_s, rates[1])
        share = rate / ceiling if rate and ceiling else None
        images_s = images * 1e3 / ms if images else None
        return replace(self, timing=outcome, gb_s=gb_s, tflops=tflops, share=share, images_s=images_s)


def run_case(
    case: Case, ceilings: Ceilings, seconds: float, min_samples: int = 5, deadline: float = math.inf
) -> list[Row]:
    """Check and time every variant of ``case``; a late one that is not ready at the ``deadline`` is "not run".

    Raises:
        DisagreementError: our own output is wrong, or our variant cannot run.
    """
    # PyTorch compiles a function for at most eight shapes, so each case starts afresh.
    torch._dynamo.reset()
    gc.collect()
    generator = torch.Generator(case.device).manual_seed(0)
    with own_stream(case.device):
        try:
            first = case.make_inputs(generator)
            judge = case.judge(first)
        except torch.OutOfMemoryError as error:
            return [Row.failed(name, error, "inputs and oracle: ") for name in case.variants]
        rows = {name: check_variant(case, name, first, judge, deadline) for name in case.variants}
        for name, row in rows.items():
            if is_ours(name) and row.status in {"disagrees", "failed"}:
                raise DisagreementError(f"{case.name}: {name} {row.status}: {row.note}")
        size = sum(t.nbytes for t in first if isinstance(t, torch.Tensor))
        inputs = [first] + [case.make_inputs(generator) for _ in range(input_sets(size, case.device) - 1)]
        calls = {}
        for name in [name for name, row in rows.items() if row.status == "ok"]:
            try:
                calls[name] = [case.variant(name).bind(arguments) for arguments in inputs]
            except Exception as error:  # all input sets may need more memory than one
                rows[name] = Row.failed(name, error)
        rates = ceilings.matmul_tflops.get(name_of(case.dtype)), ceilings.copy_gb_s
        for name, outcome in measure(calls, case.device, seconds=seconds, min_samples=min_samples).items():
            rows[name] = rows[name].timed(outcome, case.images, case.flops, case.bytes_moved, rates)
    return list(rows.values())


def check_variant(
    case: Case, name: str, inputs: tuple[Any, ...], judge: Callable[[Any], float], deadline: float = math.inf
) -> Row:
    """A row with the error of the variant's output and no figures yet, or with the reason why it cannot be timed."""
    variant = case.variants[name]
    if isinstance(variant, str):
        return Row(name, "absent", variant)
    if case.device.type == "cpu" and (note := lack_of_memory(variant.needs_bytes, case.device)):
        return Row(name, "out of memory", note)
    try:
        with time_limit(deadline if variant.late else math.inf):
            error = judge(variant.bind(inputs)())
    except (Exception, OutOfTimeError) as raised:  # a peer may fail in any way
        return Row.failed(name, raised)
    finally:
        release(case.device)
    allowed = TOLERANCE[case.dtype]
    if error <= allowed:  # false for NaN
        return Row(name, "ok", error=error)
    return Row(name, "disagrees", f"error {error:.2g} of the largest value, allowed {allowed:.2g}")


def lack_of_memory(needs_bytes: int, device: torch.device) -> str | None:
    """A note where ``needs_bytes`` are more than is free, else None."""
    free = available_memory(device)
    return f"needs {needs_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free" if needs_bytes > free else None


def timed_rows(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, images: int, flops: int = 0, **options: Any
) -> list[Row]:
    """Time calls that were checked against each other: a row for each; ``options`` are those of ``measure``."""
    outcomes = measure({name: [call] for name, call in calls.items()}, device, **options)
    return [Row(name, "ok").timed(outcome, images, flops) for name, outcome in outcomes.items()]


def time_once(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The output of a call, and its seconds."""
    start = time.perf_counter()
    output = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return output, time.perf_counter() - start


def is_ours(variant: str) -> bool:
    """True for ``ours`` and ``ours compiled``."""
    return variant.split()[0] == OURS


def relative_error(output: Any, oracle: Any) -> float:
    """``max|output - oracle| / max|oracle|``, the largest of them for tuples of tensors.

    It is infinite where shapes differ, and NaN where an output has a NaN.
    """
    if isinstance(oracle, tuple):
        return largest(relative_error(a, b) for a, b in zip(output, oracle, strict=True))
    if output.shape != oracle.shape:
        return float("inf")
    difference = (output.double() - oracle.double()).abs().max() / oracle.double().abs().max()
    return difference.item()


def judge_by(function: Callable[..., Any]) -> Callable[[tuple[Any, ...]], Callable[[Any], float]]:
    """The judge of a case, see ``Case``, by the ``relative_error`` from ``function`` in float64."""

    def judge(inputs: tuple[Any, ...]) -> Callable[[Any], float]:
        exact = (x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
        oracle = function(*exact)
        return lambda output: relative_error(output, oracle)

    return judge


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN if one is, which ``max`` would drop."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def in_pass(function: Callable[..., torch.Tensor], count: int, backward: bool) -> Callable[..., Any]:
    """``function``, or for ``backward`` one that gives its result and the gradients of the inputs that require one.

    That one takes the ``count`` inputs of ``function``, and where the result is no scalar, the gradient of the result.
    """

    def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
        out = function(*inputs[:count])
        leaves = [x for x in inputs[:count] if isinstance(x, torch.Tensor) and x.requires_grad]
        return (out.detach(), *torch.autograd.grad(out, leaves, *inputs[count:]))

    return run if backward else function


def compiled(function: Callable[..., Any], autotune: bool = False) -> Callable[..., Any]:
    """``function`` under torch.compile, with max-autotune if wanted, whose log is left out.

    PyTorch's own CUDA graphs stay off: ``timing`` captures every variant alike.
    """
    options: dict[str, Any] = {}
    if autotune:
        logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.CRITICAL)
        options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
        quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
        options |= {name: value for name, value in quiet.items() if hasattr(torch._inductor.config, name)}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)
