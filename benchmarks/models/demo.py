"""Segmentation of a photograph by the reference, strong peers and ours: speed, memory and equal labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from segmenter_fast.captions import RANDOM, captioned
from segmenter_fast.io.atomic import write_png
from segmenter_fast.io.images import ImageSource
from segmenter_fast.visualize import default_palette, overlay

from ..case import Row
from ..device import Ceilings
from ..timing import own_stream
from .comparison import Comparison
from .peers import PHOTOGRAPH, ModelCase, centre
from .summary import compared

VARIANTS = ("seg_t_mask_16", "seg_b_mask_16")
SIDE = 512


def run_demo(
    out: Path,
    device: torch.device,
    dtype: torch.dtype,
    image: ImageSource = PHOTOGRAPH,
    variants: Sequence[str] = VARIANTS,
    seconds: float = 3.0,
    show: Callable[[str], object] = lambda stage: None,
) -> Iterator[tuple[dict[str, Any], list[Row], Path]]:
    """Segment the 512 x 512 centre of ``image`` with 150 classes and random weights; ``show`` is told each stage.

    Yields:
        For each variant the parameters and rows of its case, and the overlay's file, which is written to ``out``.

    Raises:
        OSError: an image that cannot be read or a folder that cannot be written.
        DisagreementError: our output is wrong, or our model cannot run.
        RuntimeError: a model that could not be timed, with the reason.
    """
    pixels = centre(image, SIDE)
    for variant in variants:
        case = ModelCase(variant, dtype, SIDE)
        with own_stream(device), torch.inference_mode():
            comparison = Comparison(case, device, image, runtimes=())
            rows = comparison.rows(Ceilings(0.0, {}), seconds, show)
        if untimed := next((row for row in compared(rows) if row.timing is None), None):
            raise RuntimeError(f"{variant}: the {untimed.variant} model could not be timed: {untimed.note}")
        path = out / f"{variant}.png"
        picture = overlay(pixels, comparison.labels[0].cpu().numpy(), default_palette(case.classes))
        write_png(captioned([[picture]], note=RANDOM), path)
        yield case.parameters, rows, path
