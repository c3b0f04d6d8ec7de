"""The cases of every op. ``cases(name, device, quick)`` lists them, most valuable first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..cases import Case
from . import attention, mask_scores, upsample

OPS: dict[str, Callable[[torch.device, bool], list[Case]]] = {
    "upsample_argmax": partial(upsample.cases, "upsample_argmax"),
    "upsample_cross_entropy": partial(upsample.cases, "upsample_cross_entropy"),
    "upsample_softmax": partial(upsample.cases, "upsample_softmax"),
    "attention": attention.cases,
    "mask_scores": mask_scores.cases,
}
