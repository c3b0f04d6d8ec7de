"""The main job on a photograph, by the oracle, a strong peer and the fast model: speed and agreement in one table.

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

from .peers import strong_peer
from .timing import Failure, Timing, measure, own_stream

PHOTOGRAPH = str(files("segmenter_fast") / "assets" / "coffee.jpg")
VARIANTS = ("seg_t_mask_16", "seg_b_mask_16")
SIDE = 512


@dataclass(frozen=True)
class Comparison:
    """One variant, batch 1: times of the models, and how far peer and fast agree with the reference."""

    variant: str
    dtype: torch.dtype
    reference: Timing
    peer: Timing
    fast: Timing
    logit_difference: float
    """Largest absolute difference of the fast logits; they have unit variance over the classes."""
    peer_labels: float
    """Share of the peer's labels that equal the reference's."""
    equal_labels: float
    """Share of the fast labels that equal the reference's."""
    overlay: Path


def run_demo(
    out: Path,
    device: torch.device,
    dtype: torch.dtype,
    image: ImageSource = PHOTOGRAPH,
    variants: Sequence[str] = VARIANTS,
    seconds: float = 3.0,
) -> Iterator[Comparison]:
    """Segment the 512 x 512 centre of ``image`` with 150 classes, write overlays to ``out``, one comparison each.

    The reference is float32 with attention written out and full-size logits. The peer has SDPA, the same weights in
    ``dtype`` and torch.compile; the fast model is ``Segmenter.optimize`` in ``dtype``. The weights are random, with a
    fixed seed. Speed is that of labels from a normalised image, measured in turns.

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
        pixels = read_image(photograph)
        images = normalise(pixels, model.config.mean, model.config.std, device)
        peer, fast, low = strong_peer(reference, dtype, device), model.optimize(dtype), images.to(dtype)
        logits = reference(images)
        expected, labels = logits.argmax(1), fast.segment(low)
        difference = (fast(low).float() - logits).abs().max().item()
        del logits
        times = measure(
            {
                "reference": [lambda: reference.segment(images)],
                "peer": [lambda: peer(low)],
                "fast": [lambda: fast.segment(low)],
            },
            device,
            seconds=seconds,
        )
        peer_equal, equal = ((found == expected).float().mean().item() for found in (peer(low), labels))
    good = {}
    for name, time in times.items():
        if isinstance(time, Failure):
            raise RuntimeError(f"{variant}: the {name} model could not be timed: {time.note}")
        good[name] = time
    path = out / f"{variant}.png"
    partial = path.with_suffix(".partial.png")
    overlay(pixels, labels[0].cpu().numpy(), default_palette(model.config.num_classes)).save(partial)
    partial.replace(path)
    return Comparison(
        variant, dtype, good["reference"], good["peer"], good["fast"], difference, peer_equal, equal, path
    )


def table(comparisons: Sequence[Comparison]) -> Table:
    """What ``run_demo`` found, a row a variant."""
    dtypes = ", ".join(sorted({str(row.dtype).removeprefix("torch.") for row in comparisons}))
    result = Table(
        title=f"one {SIDE} x {SIDE} photograph, images/s",
        caption=f"reference: float32; peer: SDPA and torch.compile, {dtypes}; fast: optimize(), {dtypes}",
    )
    result.add_column("variant", no_wrap=True)
    columns = (
        "reference",
        "peer",
        "fast",
        "speed-up over\nreference",
        "speed-up\nover peer",
        "equal labels\npeer",
        "fast",
    )
    for column in (*columns, "largest logit\ndifference"):
        result.add_column(column, justify="right")
    for row in comparisons:
        times = row.reference, row.peer, row.fast
        result.add_row(
            row.variant,
            *(f"{1000 / time.median_ms:.2f}" for time in times),
            *(f"{time.median_ms / row.fast.median_ms:.1f}x" for time in times[:2]),
            f"{row.peer_labels:.1%}",
            f"{row.equal_labels:.1%}",
            f"{row.logit_difference:.3g}",
        )
    return result
