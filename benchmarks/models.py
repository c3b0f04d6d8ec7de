"""A whole model by every means: checked against the reference, then timed in turns.

``run_point`` gives one row for each model: the reference (official arithmetic, eager, float32), the peers (SDPA, low
dtype, torch.compile; on CUDA also max-autotune, and cuDNN's attention) and ours (``Segmenter.optimize``).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.attention import SDPBackend

from segmenter_fast import Segmenter, SegmenterConfig, create_model
from segmenter_fast.config import variant_config
from segmenter_fast.describe import count_macs
from segmenter_fast.io.images import normalise, read_image
from segmenter_fast.reference import ReferenceSegmenter

from .agreement import Agreement, Yardstick, share
from .cases import OURS, DisagreementError, Row, compiled
from .demo import PHOTOGRAPH
from .device import Ceilings, name_of
from .peers import with_sdpa
from .timing import Failure, Timing, available_memory, measure, own_stream, release

REFERENCE, PEER, AUTOTUNED, CUDNN = "reference", "peer", "peer max-autotune", "peer cuDNN"
MODELS = (REFERENCE, PEER, AUTOTUNED, CUDNN, OURS)
# A call longer than this is sampled as seldom as a median with a spread allows.
SLOW_SECONDS = 1.5


def in_words(parameters: dict[str, Any]) -> str:
    """ "512 px, batch 1, 150 classes, float32" of those that are there."""
    texts = {"size": "{} px", "batch": "batch {}", "classes": "{} classes", "dtype": "{}"}
    words = [text.format(parameters[key]) for key, text in texts.items() if key in parameters]
    return ", ".join(words if parameters.get("compiled", True) else [*words, "not compiled"])


@dataclass(frozen=True)
class Point:
    """A model and what it is fed: ``batch`` views of the demo's photograph, ``size`` pixels a side."""

    variant: str
    dtype: torch.dtype
    size: int = 512
    batch: int = 1
    classes: int = 150
    compile: bool = True
    """Whether peers and ours are compiled."""

    @cached_property
    def config(self) -> SegmenterConfig:
        return variant_config(self.variant).replace(num_classes=self.classes, image_size=self.size)

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "patch": self.config.patch_size,
            "tokens": (-(-self.size // self.config.patch_size)) ** 2 + self.config.num_prefix_tokens,
            "classes": self.classes,
            "size": self.size,
            "batch": self.batch,
            "dtype": name_of(self.dtype),
            "compiled": self.compile,
        }

    @property
    def name(self) -> str:
        return f"{self.variant}, {in_words(self.parameters)}"

    @property
    def flops(self) -> int:
        """Of the matrix products of one call, counted on the reference."""
        return 2 * self.batch * count_macs(self.config, self.size)

    @property
    def needs_bytes(self) -> int:
        """What the reference holds at once at least: scores and probabilities of one layer, or its logits."""
        tokens = self.parameters["tokens"]
        return 4 * self.batch * max(2 * self.config.num_heads * tokens**2, self.classes * self.size**2)


def run_point(
    point: Point, device: torch.device, ceilings: Ceilings, seconds: float, tell: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """A row for each of ``MODELS``; ``tell`` is told what is being done.

    Where our output is wrong, or ours cannot run, all rows are "refused" and have no figure.
    """
    torch._dynamo.reset()
    gc.collect()
    with own_stream(device), torch.inference_mode():
        try:
            return _Session(point, device, tell).rows(ceilings, seconds)
        except DisagreementError as error:
            return [Row(name, "refused", str(error)) for name in MODELS]
        except (torch.OutOfMemoryError, MemoryError) as error:
            failure = Failure.of(error)
            return [Row(name, failure.status, f"weights and reference: {failure.note}") for name in MODELS]
        finally:
            release(device)


class _Session:
    """One point on one device: its models with the same weights, and the calls of them that are timed."""

    def __init__(self, point: Point, device: torch.device, tell: Callable[[str], None]) -> None:
        self.point, self.device, self.tell = point, device, tell
        self.model, self.reference, self.images = build(point, device)
        self.low = self.images.to(point.dtype)

    def rows(self, ceilings: Ceilings, seconds: float) -> list[Row]:
        made = self._makers()
        rows: dict[str, Row] = {name: Row(name, "absent", why) for name, why in made.items() if isinstance(why, str)}
        self.tell("reference")
        logits, reference, failure = self._oracle()
        if failure:
            rows[REFERENCE] = failure
        expected = logits.argmax(1)
        self.tell("agreement")
        yardstick = Yardstick(
            Agreement.of(with_sdpa(self.reference, self.point.dtype)(self.low), logits), self.point.dtype
        )
        own = self.model.optimize(self.point.dtype, compile=False)(self.low)
        errors = {REFERENCE: 0.0, OURS: Agreement.of(own, logits).error}
        if fault := yardstick.fault_of_logits(errors[OURS]):
            raise DisagreementError(f"{OURS}: {fault}")
        del logits
        calls: dict[str, Callable[[], Tensor]] = {}
        equal: dict[str, float] = {REFERENCE: 1.0}
        if not failure:
            calls[REFERENCE] = reference
        for name, make in made.items():
            if isinstance(make, str) or name in rows or name == REFERENCE:
                continue
            self.tell(f"{name}: compiling, checking" if self.point.compile else f"{name}: checking")
            try:
                call = make()
                labels = call()
                equal[name] = share(labels == expected)
                fault = yardstick.fault_of_labels(equal[name])
                if name == OURS:
                    fault = fault or yardstick.fault_of_argmax(labels, own)
                if fault:
                    rows[name] = Row(name, "disagrees", fault)
                else:
                    calls[name] = call
            except Exception as raised:  # any failure of a peer is its row
                failed = Failure.of(raised)
                rows[name] = Row(name, failed.status, failed.note)
            release(self.device)
        if OURS in rows and rows[OURS].status != "out of memory":
            raise DisagreementError(f"{OURS}: {rows[OURS].note}")
        del own
        self.tell("timing")
        slow = self.seconds_of_reference > SLOW_SECONDS
        options = {"min_samples": 3, "max_samples": 5} if slow else {}
        outcomes = measure({name: [call] for name, call in calls.items()}, self.device, seconds=seconds, **options)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Failure):
                rows[name] = Row(name, outcome.status, outcome.note)
            else:
                error = errors.get(name, yardstick.peer.error)
                rows[name] = self._figures(name, error, equal[name], outcome, ceilings)
        return [rows[name] for name in MODELS]

    def _oracle(self) -> tuple[Tensor, Callable[[], Tensor], Row | None]:
        """The reference's logits and call; where it has no room, SDPA's in float32, and the row that says so."""
        free = available_memory(self.device)
        note = f"needs {self.point.needs_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        # Linux kills a process that takes too much instead of telling it.
        if self.device.type == "cuda" or self.point.needs_bytes < free:
            try:
                return self._timed_once(self.reference), partial(self.reference.segment, self.images), None
            except (torch.OutOfMemoryError, MemoryError) as error:
                note = Failure.of(error).note
            release(self.device)
        thrifty = with_sdpa(self.reference, torch.float32)
        row = Row(REFERENCE, "out of memory", f"{note}; labels are held against SDPA in float32")
        return self._timed_once(thrifty), partial(thrifty.segment, self.images), row

    def _timed_once(self, model: ReferenceSegmenter) -> Tensor:
        start = time.perf_counter()
        logits = model(self.images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds_of_reference = time.perf_counter() - start
        return logits

    def _makers(self) -> dict[str, Callable[[], Callable[[], Tensor]] | str]:
        """What makes each model's call, or why there is none."""
        point, cuda = self.point, self.device.type == "cuda"
        only_gpu = "for CUDA only" if point.compile else "needs torch.compile"
        return {
            REFERENCE: lambda: partial(self.reference.segment, self.images),
            PEER: self._peer,
            AUTOTUNED: partial(self._peer, autotune=True) if cuda and point.compile else only_gpu,
            CUDNN: partial(self._peer, backend=SDPBackend.CUDNN_ATTENTION) if cuda and point.compile else only_gpu,
            OURS: self._ours,
        }

    def _peer(self, autotune: bool = False, backend: SDPBackend | None = None) -> Callable[[], Tensor]:
        segment: Callable[[Tensor], Tensor] = with_sdpa(self.reference, self.point.dtype, backend).segment
        if self.point.compile:
            segment = compiled(segment, self.device, autotune)
        return lambda: segment(self.low)

    def _ours(self) -> Callable[[], Tensor]:
        # Without its own CUDA graphs: the clock captures every model alike.
        fast = self.model.optimize(self.point.dtype, compile=self.point.compile, cuda_graph=False)
        return lambda: fast.segment(self.low)

    def _figures(self, name: str, error: float, labels: float, timing: Timing, ceilings: Ceilings) -> Row:
        tflops = self.point.flops / timing.median_ms / 1e9
        rate = ceilings.matmul_tflops.get("float32" if name == REFERENCE else name_of(self.point.dtype))
        return Row(
            name,
            "ok",
            "",
            error,
            timing,
            tflops=tflops,
            share=tflops / rate if rate else None,
            images_s=1000 * self.point.batch / timing.median_ms,
            labels=labels,
        )


def build(point: Point, device: torch.device) -> tuple[Segmenter, ReferenceSegmenter, Tensor]:
    """Ours and the reference with the same random weights, and ``(B, 3, S, S)`` normalised images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(point.variant, num_classes=point.classes, image_size=point.size)
    model = model.to(device).eval()
    reference = ReferenceSegmenter(model.config).to(device).eval()
    reference.load_state_dict(model.state_dict())
    photograph = np.asarray(ImageOps.fit(Image.fromarray(read_image(PHOTOGRAPH)), (point.size, point.size)))
    image = normalise(photograph, model.config.mean, model.config.std, device)
    step = max(1, point.size // point.batch)
    return model, reference, torch.cat([image.roll(i * step, -1) for i in range(point.batch)])
