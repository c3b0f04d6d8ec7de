"""Where the time of a whole model goes: encoder, decoder, and upsampling with argmax, measured one by one.

Nothing is compiled here, so that each part can be called alone; the parts do not add up to the compiled model's time.
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

from .agreement import Agreement, Yardstick, share
from .cases import OURS, Row
from .models import PEER, REFERENCE, Point, build
from .peers import with_sdpa
from .timing import Failure, available_memory, measure, own_stream

PARTS = ("encoder", "decoder", "upsample")
Split = list[tuple[dict[str, Any], list[Row]]]


def split_point(point: Point, device: torch.device, seconds: float) -> Split:
    """A case for each part, a row for each of reference, peer and ours; ``seconds`` for each part.

    The parts are first run one after the other; where the labels that come out are wrong, every row is "refused". Where
    there is no room, every row is "out of memory".
    """
    names = (REFERENCE, PEER, OURS)

    def nothing(status: str, note: str) -> Split:
        return [(point.parameters | {"part": part}, [Row(name, status, note) for name in names]) for part in PARTS]

    free = available_memory(device)
    if device.type == "cpu" and point.needs_bytes > free:
        return nothing("out of memory", f"needs {point.needs_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    gc.collect()
    with own_stream(device), torch.inference_mode():
        try:
            calls, fault = _calls(point, device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return nothing("out of memory", Failure.of(error).note)
        if fault:
            return nothing("refused", fault)
        found = []
        for part in PARTS:
            outcomes = measure({name: [calls[part][name]] for name in names}, device, seconds=seconds, min_samples=3)
            rows = [
                Row(name, outcome.status, outcome.note)
                if isinstance(outcome, Failure)
                else Row(name, "ok", timing=outcome, images_s=1000 * point.batch / outcome.median_ms)
                for name, outcome in outcomes.items()
            ]
            found.append((point.parameters | {"part": part}, rows))
        return found


def _calls(point: Point, device: torch.device) -> tuple[dict[str, dict[str, Callable[[], Tensor]]], str | None]:
    """The calls of every part by every model, and what is wrong with our labels, if anything."""
    model, reference, images = build(point, device)
    peer, ours, low = (
        with_sdpa(reference, point.dtype),
        model.optimize(point.dtype, compile=False),
        images.to(point.dtype),
    )
    patch = point.config.patch_size
    grid = -(-point.size // patch)
    size, crop = (grid * patch,) * 2, (point.size,) * 2
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {part: {} for part in PARTS}
    ends = {}
    whole: Any
    for name, whole, given in ((REFERENCE, reference, images), (PEER, peer, low), (OURS, ours, low)):
        padded = F.pad(given, (0, size[1] - point.size, 0, size[0] - point.size))
        features = whole.encoder(padded)
        # Contiguous for everyone: F.interpolate copies channels-last results twice on a CPU.
        masks = whole.decoder(features).mT.unflatten(2, (grid, grid)).contiguous()
        calls["encoder"][name] = partial(whole.encoder, padded)
        calls["decoder"][name] = partial(whole.decoder, features)
        upsample = _fused if name == OURS else _plain
        calls["upsample"][name] = partial(upsample, masks, size, crop)
        ends[name] = masks, upsample(masks, size, crop)
    oracle = _logits(ends[REFERENCE][0], size, crop)
    yardstick = Yardstick(Agreement.of(_logits(ends[PEER][0], size, crop), oracle), point.dtype)
    own, labels = _logits(ends[OURS][0], size, crop), ends[OURS][1]
    fault = (
        yardstick.fault_of_logits(Agreement.of(own, oracle).error)
        or yardstick.fault_of_labels(share(labels == ends[REFERENCE][1]))
        or yardstick.fault_of_argmax(labels, own)
    )
    return calls, fault


def _fused(masks: Tensor, size: tuple[int, int], crop: tuple[int, int]) -> Tensor:
    return kernels.upsample_argmax(masks, size, crop)


def _plain(masks: Tensor, size: tuple[int, int], crop: tuple[int, int]) -> Tensor:
    return _logits(masks, size, crop).argmax(1)


def _logits(masks: Tensor, size: tuple[int, int], crop: tuple[int, int]) -> Tensor:
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[..., : crop[0], : crop[1]]
