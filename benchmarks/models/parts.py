"""Time of encoder, decoder, and upsampling with argmax, measured one by one.

Nothing is compiled, so that each part can be called alone; the parts do not add up to the compiled model's time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import kernels

from ..case import OURS, DisagreementError, Row, lack_of_memory, timed_rows
from ..results import CaseRows
from ..timing import Failure, own_stream
from .comparison import PEER, REFERENCE, Accuracy, Limits, share
from .peers import ModelCase, build, with_sdpa

PARTS = ("encoder", "decoder", "upsample")
Calls = dict[str, dict[str, Callable[[], Tensor]]]


class Groups(NamedTuple):
    """Calls of one model in groups, each timed against the others of its group.

    ``key`` is the parameter of cases that tells the group, ``names`` has the calls of each. ``make`` makes them, with
    options of ``timed_rows``.
    """

    key: str
    names: dict[str, tuple[str, ...]]
    make: Callable[[ModelCase, torch.device], tuple[Calls, dict[str, int]]]

    def measure(self, case: ModelCase, device: torch.device, seconds: float) -> CaseRows:
        """A case for each group, within ``seconds`` for all of them.

        Every row is "refused" where ``make`` finds wrong labels, and "out of memory" where there is no room.
        """
        if device.type == "cpu" and (note := lack_of_memory(case.needs_bytes, device)):
            return self.without_figures(case, "out of memory", note)
        gc.collect()
        with own_stream(device), torch.inference_mode():
            try:
                calls, options = self.make(case, device)
            except (torch.OutOfMemoryError, MemoryError) as error:
                return self.without_figures(case, "out of memory", Failure.of(error).note)
            except DisagreementError as error:
                return self.without_figures(case, "refused", str(error))
            share = seconds / len(calls)
            rows = {name: timed_rows(own, device, case.batch, seconds=share, **options) for name, own in calls.items()}
        return [(case.parameters | {self.key: name}, own) for name, own in rows.items()]

    def without_figures(self, case: ModelCase, status: str, note: str) -> CaseRows:
        rows = {group: [Row(name, status, note) for name in names] for group, names in self.names.items()}
        return [(case.parameters | {self.key: group}, own) for group, own in rows.items()]


def _calls(case: ModelCase, device: torch.device) -> tuple[Calls, dict[str, int]]:
    model, reference, images = build(case, device)
    peer, ours = with_sdpa(reference, case.dtype), model.optimize(case.dtype, compile=False)
    low = images.to(case.dtype)
    grid = -(-case.size // case.config.patch_size)
    size, crop = (grid * case.config.patch_size,) * 2, (case.size,) * 2
    calls: Calls = {part: {} for part in PARTS}
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
    if fault:
        raise DisagreementError(fault)
    return calls, {"min_samples": 3}


GROUPS = Groups("part", dict.fromkeys(PARTS, (REFERENCE, PEER, OURS)), _calls)


def _logits(masks: Tensor, size: tuple[int, int], crop: tuple[int, int]) -> Tensor:
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[..., : crop[0], : crop[1]]
