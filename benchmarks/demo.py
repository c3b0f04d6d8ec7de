"""The main job on a photograph, by the oracle and by the fast model: speed and agreement in one table.

``python -m segmenter_fast.benchmarks.demo`` and ``segmenter-fast demo`` run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rich.table import Table

from segmenter_fast import Segmenter, create_model
from segmenter_fast.images import ImageSource, normalise, read_image
from segmenter_fast.reference import ReferenceSegmenter
from segmenter_fast.visualize import default_palette, overlay

from .timing import Failure, Timing, measure, own_stream

PHOTOGRAPH = str(files("segmenter_fast") / "assets" / "coffee.jpg")
VARIANTS = ("seg_t_mask_16", "seg_b_mask_16")
SIDE = 512


@dataclass(frozen=True)
class Comparison:
    """One variant, batch 1: milliseconds of both models and how far their results agree."""

    variant: str
    dtype: torch.dtype
    reference: Timing
    fast: Timing
    logit_difference: float
    """Largest absolute difference of the logits; they have unit variance over the classes."""
    equal_labels: float
    overlay: Path

    @property
    def speed_up(self) -> float:
        return self.reference.median_ms / self.fast.median_ms


def run_demo(
    out: Path,
    device: torch.device,
    dtype: torch.dtype,
    image: ImageSource = PHOTOGRAPH,
    variants: Sequence[str] = VARIANTS,
    seconds: float = 3.0,
) -> Iterator[Comparison]:
    """Segment the 512 x 512 centre of ``image`` with 150 classes, write overlays to ``out``, one comparison each.

    The reference is float32 with attention written out and full-size logits; the fast model has the same weights in
    ``dtype``. The weights are random, with a fixed seed. Speed is that of ``segment``, measured in turns.

    Raises:
        OSError: an image that cannot be read or a folder that cannot be written.
        RuntimeError: a model that could not be timed, with the reason.
    """
    out.mkdir(parents=True, exist_ok=True)
    pixels = ImageOps.fit(Image.fromarray(read_image(image)), (SIDE, SIDE))
    for variant in variants:
        yield _compare(variant, pixels, out, device, dtype, seconds)


@torch.inference_mode()
def _compare(
    variant: str, photograph: Image.Image, out: Path, device: torch.device, dtype: torch.dtype, seconds: float
) -> Comparison:
    torch.manual_seed(0)
    with own_stream(device):
        model: Segmenter = create_model(variant, image_size=SIDE).to(device).eval()
        reference = ReferenceSegmenter(model.config).to(device).eval()
        reference.load_state_dict(model.state_dict())
        model = model.to(dtype)
        pixels = read_image(photograph)
        images = normalise(pixels, model.config.mean, model.config.std, device)
        expected, labels = reference(images), model.segment(images)
        difference = (model(images).float() - expected).abs().max().item()
        equal = (labels == expected.argmax(1)).float().mean().item()
        del expected
        calls = {"reference": [lambda: reference.segment(images)], "fast": [lambda: model.segment(images)]}
        times = measure(calls, device, seconds=seconds)
    for name, time in times.items():
        if isinstance(time, Failure):
            raise RuntimeError(f"{variant}: the {name} model could not be timed: {time.note}")
    path = out / f"{variant}.png"
    partial = path.with_suffix(".partial.png")
    overlay(pixels, labels[0].cpu().numpy(), default_palette(model.config.num_classes)).save(partial)
    partial.replace(path)
    return Comparison(variant, dtype, times["reference"], times["fast"], difference, equal, path)  # type: ignore[arg-type]


def table(comparisons: Sequence[Comparison]) -> Table:
    """What ``run_demo`` found, a row a variant."""
    dtypes = ", ".join(sorted({str(row.dtype).removeprefix("torch.") for row in comparisons}))
    result = Table(title=f"one {SIDE} x {SIDE} photograph, 150 classes: reference in float32, fast in {dtypes}")
    result.add_column("variant", no_wrap=True)
    for column in ("reference\nimages/s", "fast\nimages/s", "speed-up", "largest logit\ndifference", "equal\nlabels"):
        result.add_column(column, justify="right")
    for row in comparisons:
        result.add_row(
            row.variant,
            f"{1000 / row.reference.median_ms:.2f}",
            f"{1000 / row.fast.median_ms:.2f}",
            f"{row.speed_up:.1f}x",
            f"{row.logit_difference:.3g}",
            f"{row.equal_labels:.1%}",
        )
    return result
