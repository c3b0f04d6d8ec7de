"""Comparison of whole models on one input: all are checked against the reference, then timed in turns.

The models are the reference (official arithmetic, eager, float32), the peers (SDPA, low dtype, torch.compile; on CUDA
also max-autotune, and cuDNN's attention; on a CPU other programs, see ``runtimes``) and ours (``Segmenter.optimize``).

On CUDA the models are timed again whenever one more of them is ready, the slowest to compile last, and the rows are
reported each time: what is measured is kept if the time runs out.

Random weights give logits that lie close together, so that rounding alone changes labels. The effect of rounding in a
dtype is therefore measured on the peer before it is compiled: the reference with PyTorch's own attention.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from segmenter_fast.io.images import ImageSource
from segmenter_fast.reference import ReferenceSegmenter

from ..case import OURS, DisagreementError, Row, compiled, is_ours, lack_of_memory, time_once
from ..deadline import OutOfTimeError, time_limit
from ..device import Ceilings, name_of
from ..timing import Failure, Timing, measure, own_stream, peak_memory, release
from .peers import PHOTOGRAPH, ModelCase, build, with_sdpa
from .runtimes import ONNX_RUNTIME, OPENVINO, absence, make_call

REFERENCE, PEER, AUTOTUNED, CUDNN = "reference", "peer", "peer max-autotune", "peer cuDNN"
RUNTIMES = (OPENVINO, ONNX_RUNTIME)
MODELS = (REFERENCE, PEER, AUTOTUNED, CUDNN, *RUNTIMES, OURS)
# Peers that wait until every case has run without them: they take longest to compile.
LATE = (CUDNN, AUTOTUNED)
# A reference slower than this is sampled 3 to 5 times.
SLOW_SECONDS = 1.5
# A peer with larger errors than this excuses nothing: logits have unit variance over the classes.
LARGEST_ERROR = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}
Segment = Callable[[], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """``error``: root mean square difference of the logits. ``labels``: share of equal labels."""

    error: float
    labels: float

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor) -> Accuracy:
        """Of two ``(B, K, H, W)`` logits."""
        error = (logits - expected).float().square().mean().sqrt().item()
        return cls(error, share(logits.argmax(1) == expected.argmax(1)))


@dataclass(frozen=True)
class Limits:
    """Allowed errors of a model in ``dtype``: twice those of the ``peer``. Faults are None where a model is right."""

    peer: Accuracy
    dtype: torch.dtype

    def logits_fault(self, error: float) -> str | None:
        allowed = 2 * min(self.peer.error, LARGEST_ERROR[self.dtype]) + 1e-4
        return None if error <= allowed else f"logits are off by {error:.2g}, allowed {allowed:.2g}"  # also for NaN

    def labels_fault(self, equal: float) -> str | None:
        """``equal`` is the share of labels that are the reference's."""
        allowed = 1 - 2 * (1 - max(self.peer.labels, 0.75)) - 0.005
        if equal >= allowed:
            return None
        return f"{equal:.2%} of the labels are the reference's, at least {allowed:.2%} must be"

    def argmax_fault(self, labels: Tensor, logits: Tensor) -> str | None:
        """Compare ``labels`` with the argmax of the model's own ``logits``.

        The logits were computed without the compiler, which rounds differently. A label may score below the best class
        by as much as rounding explains, and by more at one pixel in a thousand.
        """
        slack = 8 * min(self.peer.error, LARGEST_ERROR[self.dtype]) + 1e-4
        chosen = logits.gather(1, labels.long().unsqueeze(1)).squeeze(1)
        right = share(logits.amax(1) - chosen <= slack)
        return None if right >= 0.999 else f"{right:.2%} of the labels are the argmax of their logits, 99.9% must be"


def in_stages(device: torch.device) -> bool:
    """True on CUDA, where a model takes longer to compile than to time."""
    return device.type == "cuda"


def names_of(case: ModelCase) -> tuple[str, ...]:
    """All models of a case, those of ours with token merging last."""
    return *MODELS, *(f"{OURS} {merge}" for merge in case.merge)


def share(holds: Tensor) -> float:
    return holds.float().mean().item()


@dataclass(frozen=True)
class Plan:
    """The part of a comparison on CUDA that is to be done: LATE peers or none, until ``deadline`` (``time.monotonic``).

    ``report`` gets all rows whenever there are more figures.
    """

    late: bool = True
    deadline: float = math.inf
    report: Callable[[list[Row]], object] = lambda rows: None


def compare_models(
    case: ModelCase, device: torch.device, ceilings: Ceilings, seconds: float, plan: Plan = Plan()
) -> list[Row]:
    """A row for each model of ``names_of``.

    Where our output is wrong, or ours cannot run, all rows are "refused" and have no figures.
    """
    with own_stream(device), torch.inference_mode():
        try:
            return Comparison(case, device).rows(ceilings, seconds, plan=plan)
        except DisagreementError as error:
            return [Row(name, "refused", str(error)) for name in names_of(case)]
        except (torch.OutOfMemoryError, MemoryError) as error:
            return [Row.failed(name, error, "weights and reference: ") for name in names_of(case)]
        finally:
            release(device)


class Comparison:
    """The models of one case on one device; made and used inside ``own_stream`` and ``inference_mode``.

    ``runtimes`` are the programs beside PyTorch that take part.

    Attributes:
        labels: ``(B, S, S)`` labels of ours, once ``rows`` has checked them.
    """

    labels: Tensor

    def __init__(
        self, case: ModelCase, device: torch.device, image: ImageSource = PHOTOGRAPH, runtimes: Sequence[str] = RUNTIMES
    ) -> None:
        torch._dynamo.reset()
        gc.collect()
        self.case, self.device, self.runtimes = case, device, runtimes
        self.held: dict[str, int | None] = {}  # bytes that a runtime takes at its first call and keeps
        self.merges = dict(zip(names_of(case)[len(MODELS) :], case.merge, strict=True))
        self.model, self.reference, self.images = build(case, device, image)
        self.low = self.images.to(case.dtype)

    def rows(
        self,
        ceilings: Ceilings,
        seconds: float,
        show: Callable[[str], object] = lambda stage: None,
        plan: Plan = Plan(),
    ) -> list[Row]:
        """Check and time the models for about ``seconds``: a row for each one; ``show`` is told each stage.

        Raises:
            DisagreementError: our output is wrong, or our model cannot run.
            torch.OutOfMemoryError, MemoryError: no room for the check.
        """
        found: list[Row] = []
        for checked, calls in self._checked(show, plan):
            rows = checked.copy()
            slow = {"min_samples": 3, "max_samples": 5} if self.reference_seconds > SLOW_SECONDS else {}
            show(f"{self.case.variant}: timing {', '.join(calls)}")
            outcomes = measure({name: [call] for name, call in calls.items()}, self.device, seconds=seconds, **slow)
            for name, outcome in outcomes.items():
                if isinstance(outcome, Timing) and name in self.held:
                    outcome = replace(outcome, peak_bytes=self.held[name])
                in_float32 = name in (REFERENCE, ONNX_RUNTIME)
                rate = ceilings.matmul_tflops.get("float32" if in_float32 else name_of(self.case.dtype))
                flops = self.case.flops_with(self.merges.get(name))
                rows[name] = rows[name].timed(outcome, self.case.batch, flops, rates=(rate, None))
            found = [rows[name] for name in names_of(self.case) if name in rows]
            plan.report(found)
        return found

    def _checked(
        self, show: Callable[[str], object], plan: Plan
    ) -> Iterator[tuple[dict[str, Row], dict[str, Segment]]]:
        """A row for each model, and the calls of those that agree; on CUDA after each that is new in this plan."""
        calls: dict[str, Segment] = {}
        show(f"{self.case.variant}: running {REFERENCE}")
        row, logits = self._run_reference()
        rows = {REFERENCE: row}
        if row.status == "ok":
            calls[REFERENCE] = partial(self.reference.segment, self.images)
        expected = logits.argmax(1)
        peer = Accuracy.of(with_sdpa(self.reference, self.case.dtype)(self.low), logits)
        limits = Limits(peer, self.case.dtype)
        own_logits = self.model.optimize(self.case.dtype, compile=False)(self.low)
        own_error = Accuracy.of(own_logits, logits).error
        if fault := limits.logits_fault(own_error):
            raise DisagreementError(f"{OURS}: {fault}")
        del logits
        stages, makers, ready = in_stages(self.device), self.makers(), {}
        for name in sorted(makers, key=self._cost) if stages else makers:
            make = makers[name]
            if isinstance(make, str):
                rows[name] = Row(name, "absent", make)
            elif stages and name in LATE and not plan.late:
                rows[name] = Row(name, "not run", "comes after the other cases")
            else:
                rows[name], ready[name] = Row(name, "not run", "the run ended before it"), make
        for name, make in ready.items():
            show(f"{self.case.variant}: preparing {name}")
            try:
                with time_limit(plan.deadline if name != OURS else math.inf):
                    call = make()
                    labels = call()
                equal = share(labels == expected)
                fault = limits.labels_fault(equal)
                if name in self.merges:  # judged by the labels of the model that merges, in float32
                    merged = self.model.with_merging(self.merges[name]).segment(self.images)
                    fault = limits.labels_fault(share(labels == merged))
                if name == OURS:
                    fault = fault or limits.argmax_fault(labels, own_logits)
                    self.labels = labels
            except (Exception, OutOfTimeError) as error:  # a peer may fail in any way
                rows[name] = Row.failed(name, error)
            else:
                if fault:
                    rows[name] = Row(name, "disagrees", fault)
                else:
                    calls[name] = call
                    errors = {OURS: own_error, **dict.fromkeys((*RUNTIMES, *self.merges))}
                    rows[name] = Row(name, "ok", error=errors.get(name, peer.error), labels=equal)
            release(self.device)
            if is_ours(name) and rows[name].status in {"disagrees", "failed"}:
                raise DisagreementError(f"{name}: {rows[name].note}")
            if name == next(reversed(ready)) or (stages and (name in LATE) == plan.late):
                yield rows, calls

    def _run_reference(self) -> tuple[Row, Tensor]:
        """The reference's row and logits; where it has no room, the logits are those of SDPA in float32."""
        note = lack_of_memory(self.case.needs_bytes, self.device)
        if self.device.type == "cuda" or not note:  # only CUDA reports a lack of memory as an error
            try:
                return Row(REFERENCE, "ok", error=0.0, labels=1.0), self._timed_once(self.reference)
            except (torch.OutOfMemoryError, MemoryError) as error:
                note = Failure.of(error).note
            release(self.device)
        row = Row(REFERENCE, "out of memory", f"{note}; labels are compared with those of SDPA in float32")
        return row, self._timed_once(with_sdpa(self.reference, torch.float32))

    def _timed_once(self, model: ReferenceSegmenter) -> Tensor:
        logits, self.reference_seconds = time_once(partial(model, self.images), self.device)
        return logits

    def makers(self) -> dict[str, Callable[[], Segment] | str]:
        """For each model but the reference the function that makes its call, or the reason why there is none."""
        absent = "for CUDA only" if self.case.compile else "needs torch.compile"
        cuda = self.device.type == "cuda" and self.case.compile
        return {
            PEER: self._peer,
            AUTOTUNED: partial(self._peer, autotune=True) if cuda else absent,
            CUDNN: partial(self._peer, backend=SDPBackend.CUDNN_ATTENTION) if cuda else absent,
            **{name: absence(name, self.device) or partial(self._runtime, name) for name in self.runtimes},
            OURS: self._ours,
            **{name: partial(self._ours, merge) for name, merge in self.merges.items()},
        }

    @staticmethod
    def _cost(name: str) -> int:
        """The rank of a model by the time that it takes to compile, but ours first."""
        return (OURS, PEER, CUDNN, AUTOTUNED).index(name) if name in MODELS and name not in RUNTIMES else 0

    def _runtime(self, name: str) -> Segment:
        model = with_sdpa(self.reference, torch.float32)
        call = make_call(name, model, self.images, self.case.dtype)
        self.held[name] = peak_memory(call, self.device)
        return call

    def _peer(self, autotune: bool = False, backend: SDPBackend | None = None) -> Segment:
        segment: Callable[[Tensor], Tensor] = with_sdpa(self.reference, self.case.dtype, backend).segment
        if self.case.compile:
            segment = compiled(segment, autotune)
        return lambda: segment(self.low)

    def _ours(self, merge: str = "none") -> Segment:
        # Without its own CUDA graphs: the clock captures every model alike.
        compile = "auto" if self.case.compile else False
        fast = self.model.optimize(self.case.dtype, compile=compile, cuda_graph=False, merge=merge)
        return lambda: fast.segment(self.low)
