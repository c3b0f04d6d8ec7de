"""Time of encoder, decoder, and upsampling with argmax, measured one by one.

Nothing is compiled, so that each part can be called alone; the parts do not add up to the compiled model's time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import kernels

from ..case import OURS, Row, lack_of_memory
from ..results import CaseRows
from ..timing import Failure, measure, own_stream
from .comparison import PEER, REFERENCE, Accuracy, Limits, share
from .peers import ModelCase, build, with_sdpa

PARTS = ("encoder", "decoder", "upsample")
NAMES = (REFERENCE, PEER, OURS)


def measure_parts(case: ModelCase, device: torch.device, seconds: float) -> CaseRows:
    """A case for each part, with a row for each of reference, peer and ours; ``seconds`` for each part.

    The parts first run one after the other. Every row is "refused" where the labels that come out are wrong, and "out
    of memory" where there is no room.
    """
    if device.type == "cpu" and (note := lack_of_memory(case.needs_bytes, device)):
        return without_figures(case, "out of memory", note)
    gc.collect()
    with own_stream(device), torch.inference_mode():
        try:
            calls, fault = _calls(case, device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return without_figures(case, "out of memory", Failure.of(error).note)
        if fault:
            return without_figures(case, "refused", fault)
        found = []
        for part, functions in calls.items():
            calls_of = {name: [call] for name, call in functions.items()}
            outcomes = measure(calls_of, device, seconds=seconds, min_samples=3)
            rows = [Row(name, "ok").timed(outcome, case.batch) for name, outcome in outcomes.items()]
            found.append((case.parameters | {"part": part}, rows))
    return found


def without_figures(case: ModelCase, status: str, note: str) -> CaseRows:
    return [(case.parameters | {"part": part}, [Row(name, status, note) for name in NAMES]) for part in PARTS]


def _calls(case: ModelCase, device: torch.device) -> tuple[dict[str, dict[str, Callable[[], Tensor]]], str | None]:
    """The calls of each part by model, and the reason why ours is wrong, if it is."""
    model, reference, images = build(case, device)
    peer, ours = with_sdpa(reference, case.dtype), model.optimize(case.dtype, compile=False)
    low = images.to(case.dtype)
    grid = -(-case.size // case.config.patch_size)
    size, crop = (grid * case.config.patch_size,) * 2, (case.size,) * 2
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {part: {} for part in PARTS}
    logits, labels = {}, {}
    whole: Any
    for name, whole, given in ((REFERENCE, reference, images), (PEER, peer, low), (OURS, ours, low)):
        padded = F.pad(given, (0, size[1] - case.size, 0, size[0] - case.size))
        features = whole.encoder(padded)
        masks = whole.decoder(features).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        upsample = kernels.upsample_argmax if name == OURS else lambda *given: _logits(*given).argmax(1)
        calls["encoder"][name] = partial(whole.encoder, padded)
        calls["decoder"][name] = partial(whole.decoder, features)
        calls["upsample"][name] = partial(upsample, masks, size, crop)
        logits[name], labels[name] = _logits(masks, size, crop), upsample(masks, size, crop)
    limits = Limits(Accuracy.of(logits[PEER], logits[REFERENCE]), case.dtype)
    fault = (
        limits.logits_fault(Accuracy.of(logits[OURS], logits[REFERENCE]).error)
        or limits.labels_fault(share(labels[OURS] == labels[REFERENCE]))
        or limits.argmax_fault(labels[OURS], logits[OURS])
    )
    return calls, fault


def _logits(masks: Tensor, size: tuple[int, int], crop: tuple[int, int]) -> Tensor:
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[..., : crop[0], : crop[1]]
