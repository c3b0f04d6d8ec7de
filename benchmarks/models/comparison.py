"""Comparison of whole models on one input: all are checked against the reference, then timed in turns.

The models are the reference (official arithmetic, eager, float32), the peers (SDPA, low dtype, torch.compile; on CUDA
also max-autotune, and cuDNN's attention) and ours (``Segmenter.optimize``).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from segmenter_fast.io.images import ImageSource
from segmenter_fast.reference import ReferenceSegmenter

from ..case import OURS, DisagreementError, Row, compiled, lack_of_memory
from ..device import Ceilings, name_of
from ..timing import Failure, measure, own_stream, release
from .accuracy import Accuracy, Limits, share
from .peers import PHOTOGRAPH, ModelCase, build, with_sdpa

REFERENCE, PEER, AUTOTUNED, CUDNN = "reference", "peer", "peer max-autotune", "peer cuDNN"
MODELS = (REFERENCE, PEER, AUTOTUNED, CUDNN, OURS)
# A reference slower than this is sampled 3 to 5 times.
SLOW_SECONDS = 1.5
Segment = Callable[[], Tensor]


def compare_models(
    case: ModelCase,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for each of ``MODELS``; ``report`` receives the current step.

    Where our output is wrong, or ours cannot run, all rows are "refused" and have no figures.
    """
    with own_stream(device), torch.inference_mode():
        try:
            return Comparison(case, device, report=report).rows(ceilings, seconds)
        except DisagreementError as error:
            return [Row(name, "refused", str(error)) for name in MODELS]
        except (torch.OutOfMemoryError, MemoryError) as error:
            return [Row.failed(name, error, "weights and reference: ") for name in MODELS]
        finally:
            release(device)


def compared(rows: Sequence[Row]) -> tuple[Row, Row, Row]:
    """The reference, the fastest peer (the first, with its reason, where none has a time), and ours."""
    reference, ours = (next(row for row in rows if row.variant == name) for name in (REFERENCE, OURS))
    peers = [row for row in rows if row.variant.startswith("peer")]
    return reference, min(peers, key=lambda row: row.timing.median_ms if row.timing else float("inf")), ours


class Comparison:
    """The models of one case on one device; made and used inside ``own_stream`` and ``inference_mode``.

    Attributes:
        labels: ``(B, S, S)`` labels of ours, once ``rows`` has checked them.
    """

    labels: Tensor

    def __init__(
        self,
        case: ModelCase,
        device: torch.device,
        image: ImageSource = PHOTOGRAPH,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        torch._dynamo.reset()
        gc.collect()
        self.case, self.device, self.report = case, device, report
        self.model, self.reference, self.images = build(case, device, image)
        self.low = self.images.to(case.dtype)

    def rows(self, ceilings: Ceilings, seconds: float) -> list[Row]:
        """Check and time the models for about ``seconds``: a row for each of ``MODELS``.

        Raises:
            DisagreementError: our output is wrong, or our model cannot run.
            torch.OutOfMemoryError, MemoryError: no room for the check.
        """
        rows, calls, peer_error = self._checked()
        self.report("timing")
        slow = {"min_samples": 3, "max_samples": 5} if self.reference_seconds > SLOW_SECONDS else {}
        outcomes = measure({name: [call] for name, call in calls.items()}, self.device, seconds=seconds, **slow)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Failure):
                rows[name] = Row.failed(name, outcome)
            else:
                tflops = self.case.flops / outcome.median_ms / 1e9
                rate = ceilings.matmul_tflops.get("float32" if name == REFERENCE else name_of(self.case.dtype))
                rows[name] = replace(
                    rows[name],
                    error=peer_error if rows[name].error is None else rows[name].error,
                    timing=outcome,
                    tflops=tflops,
                    share=tflops / rate if rate else None,
                    images_s=1000 * self.case.batch / outcome.median_ms,
                )
        return [rows[name] for name in MODELS]

    def _checked(self) -> tuple[dict[str, Row], dict[str, Segment], float]:
        """A row for each model, the calls of those that agree, and the error of the peer before it is compiled."""
        rows, calls = {}, {}
        self.report("reference")
        logits, call, out_of_memory = self._run_reference()
        if out_of_memory:
            rows[REFERENCE] = out_of_memory
        else:
            rows[REFERENCE], calls[REFERENCE] = Row(REFERENCE, "ok", error=0.0, labels=1.0), call
        expected = logits.argmax(1)
        self.report("checking logits")
        peer = Accuracy.of(with_sdpa(self.reference, self.case.dtype)(self.low), logits)
        limits = Limits(peer, self.case.dtype)
        own_logits = self.model.optimize(self.case.dtype, compile=False)(self.low)
        own_error = Accuracy.of(own_logits, logits).error
        if fault := limits.logits_fault(own_error):
            raise DisagreementError(f"{OURS}: {fault}")
        del logits
        for name, make in self._makers().items():
            if isinstance(make, str):
                rows[name] = Row(name, "absent", make)
                continue
            self.report(f"{name}: compiling, checking" if self.case.compile else f"{name}: checking")
            try:
                call = make()
                labels = call()
                equal = share(labels == expected)
                fault = limits.labels_fault(equal)
                if name == OURS:
                    fault = fault or limits.argmax_fault(labels, own_logits)
                    self.labels = labels
            except Exception as error:  # a peer may fail in any way
                rows[name] = Row.failed(name, error)
            else:
                if fault:
                    rows[name] = Row(name, "disagrees", fault)
                else:
                    calls[name] = call
                    rows[name] = Row(name, "ok", error=own_error if name == OURS else None, labels=equal)
            release(self.device)
        if rows[OURS].status in {"disagrees", "failed"}:
            raise DisagreementError(f"{OURS}: {rows[OURS].note}")
        return rows, calls, peer.error

    def _run_reference(self) -> tuple[Tensor, Segment, Row | None]:
        """The reference's logits and call; where it has no room, those of SDPA in float32, and a row that says so."""
        note = lack_of_memory(self.case.needs_bytes, self.device)
        if self.device.type == "cuda" or not note:  # only CUDA reports a lack of memory as an error
            try:
                return self._timed_once(self.reference), partial(self.reference.segment, self.images), None
            except (torch.OutOfMemoryError, MemoryError) as error:
                note = Failure.of(error).note
            release(self.device)
        substitute = with_sdpa(self.reference, torch.float32)
        row = Row(REFERENCE, "out of memory", f"{note}; labels are compared with those of SDPA in float32")
        return self._timed_once(substitute), partial(substitute.segment, self.images), row

    def _timed_once(self, model: ReferenceSegmenter) -> Tensor:
        start = time.perf_counter()
        logits = model(self.images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.reference_seconds = time.perf_counter() - start
        return logits

    def _makers(self) -> dict[str, Callable[[], Segment] | str]:
        """For each model but the reference the function that makes its call, or the reason why there is none."""
        absent = "for CUDA only" if self.case.compile else "needs torch.compile"
        cuda = self.device.type == "cuda" and self.case.compile
        return {
            PEER: self._peer,
            AUTOTUNED: partial(self._peer, autotune=True) if cuda else absent,
            CUDNN: partial(self._peer, backend=SDPBackend.CUDNN_ATTENTION) if cuda else absent,
            OURS: self._ours,
        }

    def _peer(self, autotune: bool = False, backend: SDPBackend | None = None) -> Segment:
        segment: Callable[[Tensor], Tensor] = with_sdpa(self.reference, self.case.dtype, backend).segment
        if self.case.compile:
            segment = compiled(segment, self.device, autotune)
        return lambda: segment(self.low)

    def _ours(self) -> Segment:
        # Without its own CUDA graphs: the clock captures every model alike.
        fast = self.model.optimize(self.case.dtype, compile=self.case.compile, cuda_graph=False)
        return lambda: fast.segment(self.low)
