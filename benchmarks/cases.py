"""A case is one comparison: inputs, variants, a judge of their outputs, and the work counted by hand.

``run_case`` lets nothing be timed before its output has passed the judge. A peer that fails, is absent or disagrees is
a row that says so. Where our own op disagrees there is no result at all: the whole case is refused.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .device import Ceilings, name_of
from .timing import Failure, Timing, available_memory, input_sets, measure, own_stream, release

OURS = "ours"
# Largest error of an output, relative to the largest value of the float64 oracle. The tests hold far tighter bounds;
# this one tells a wrong result from a rounded one, for peers that round as they like.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class DisagreementError(Exception):
    """Our own output is wrong: nothing about this case may be reported."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the case. ``run(*prepare(*inputs))`` is called; only ``run`` is timed.

    ``needs_bytes`` is a lower bound of what it allocates. Linux kills a process that takes more memory than there is
    instead of telling it, so a CPU variant that cannot fit is never started.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] | None = None
    needs_bytes: int = 0

    def bind(self, inputs: tuple[Any, ...]) -> Callable[[], Any]:
        arguments = self.prepare(*inputs) if self.prepare else inputs
        return lambda: self.run(*arguments)


@dataclass(frozen=True)
class Case:
    """``variants`` maps a name to a Variant, or to the reason why it is absent. ``judge(inputs)`` gives a function
    from an output to its error. ``bytes_moved`` and ``flops`` (of matrix products, 0 if there
    are none) are the least that any implementation needs; ``bytes_moved`` is 0 where nobody counted them, ``images``
    where a call is no whole model's.
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
        words = (f"{v}" if isinstance(v, str) else f"{k} {v}" for k, v in self.parameters.items())
        return ", ".join(words)


@dataclass(frozen=True)
class Row:
    """One variant of a case. ``status`` is ok, absent, out of memory, failed, disagrees, refused or not run; figures
    only with ok. A whole model's ``error`` is that of its logits, ``labels`` the share that equals the reference's.

    ``error`` is the judge's. ``gb_s`` counts the least bytes, ``tflops`` the counted FLOPs; ``share`` is the fraction
    of the measured ceiling, of the matrix-product rate where FLOPs are counted and of the copy bandwidth elsewhere.
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


def run_case(case: Case, ceilings: Ceilings, seconds: float, min_samples: int = 5) -> list[Row]:
    """Check, then time every variant of ``case``.

    Raises:
        DisagreementError: our own op disagrees with the oracle, or cannot run.
    """
    # PyTorch refuses to compile a function for more than eight shapes; each case is the first one again.
    torch._dynamo.reset()
    gc.collect()
    with own_stream(case.device):
        return _run_case(case, ceilings, seconds, min_samples)


def _run_case(case: Case, ceilings: Ceilings, seconds: float, min_samples: int) -> list[Row]:
    generator = torch.Generator(case.device).manual_seed(0)
    try:
        inputs = [case.make_inputs(generator)]
        judge = case.judge(inputs[0])
    except torch.OutOfMemoryError as error:
        failure = Failure.of(error)
        return [Row(name, failure.status, f"inputs and oracle: {failure.note}") for name in case.variants]
    rows, errors = _check(case, inputs[0], judge)
    size = sum(t.nbytes for t in inputs[0] if isinstance(t, torch.Tensor))
    inputs += [case.make_inputs(generator) for _ in range(input_sets(size, case.device) - 1)]
    calls = {}
    for name in errors:
        variant = case.variants[name]
        assert isinstance(variant, Variant)
        try:
            calls[name] = [variant.bind(arguments) for arguments in inputs]
        except Exception as error:  # preparing all input sets can run out of memory where one fitted
            failure = Failure.of(error)
            rows[name] = Row(name, failure.status, failure.note)
    outcomes = measure(calls, case.device, seconds=seconds, min_samples=min_samples)
    for name, outcome in outcomes.items():
        if isinstance(outcome, Timing):
            rows[name] = _figures(case, name, errors[name], outcome, ceilings)
        else:
            rows[name] = Row(name, outcome.status, outcome.note)
    return [rows[name] for name in case.variants]


def _check(
    case: Case, inputs: tuple[Any, ...], judge: Callable[[Any], float]
) -> tuple[dict[str, Row], dict[str, float]]:
    """Rows of the variants that cannot be timed, errors of those that can."""
    rows: dict[str, Row] = {}
    errors: dict[str, float] = {}
    for name, variant in case.variants.items():
        if isinstance(variant, str):
            rows[name] = Row(name, "absent", variant)
            continue
        free = available_memory(case.device)
        if case.device.type == "cpu" and variant.needs_bytes > free:
            note = f"needs {variant.needs_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            rows[name] = Row(name, "out of memory", note)
            continue
        try:
            error = judge(variant.bind(inputs)())
        except Exception as raised:  # any failure of a peer is its row
            failure = Failure.of(raised)
            rows[name] = Row(name, failure.status, failure.note)
        else:
            # Written so that a NaN fails.
            if error <= TOLERANCE[case.dtype]:
                errors[name] = error
            else:
                note = f"error {error:.2g} of the largest value, allowed {TOLERANCE[case.dtype]:.2g}"
                rows[name] = Row(name, "disagrees", note)
        release(case.device)
    for name, row in rows.items():
        if is_ours(name) and row.status in {"disagrees", "failed"}:
            raise DisagreementError(f"{case.name}: {name} {row.status}: {row.note}")
    return rows, errors


def _figures(case: Case, name: str, error: float, timing: Timing, ceilings: Ceilings) -> Row:
    ms = timing.median_ms
    gb_s = case.bytes_moved / ms / 1e6 if case.bytes_moved else None
    tflops = case.flops / ms / 1e9 if case.flops else None
    share = gb_s / ceilings.copy_gb_s if gb_s else None
    if tflops:
        rate = ceilings.matmul_tflops.get(name_of(case.dtype))
        share = tflops / rate if rate else None
    return Row(name, "ok", "", error, timing, gb_s, tflops, share, case.images * 1e3 / ms if case.images else None)


def is_ours(variant: str) -> bool:
    """Whether a variant's name says that it is ours: ``ours``, ``ours compiled``."""
    return variant.split()[0] == OURS


def relative_error(output: torch.Tensor, oracle: torch.Tensor) -> float:
    """``max|output - oracle| / max|oracle|``, inf where the shapes differ, NaN where the output has one."""
    if output.shape != oracle.shape:
        return float("inf")
    if oracle.numel() == 0:
        return 0.0
    difference = (output.double() - oracle.double()).abs().max() / oracle.double().abs().max()
    return difference.item()


def compiled(function: Callable[..., Any], device: torch.device, autotune: bool = True) -> Callable[..., Any]:
    """``function`` under torch.compile as the strong peer uses it.

    On CUDA with max-autotune, if wanted, but without its own CUDA graphs: ``timing`` captures every variant alike.
    """
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" and autotune else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def missing(package: str) -> str | None:
    """Why a peer's package cannot be used, or None where it is installed."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"
