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
from segmenter_fast.io.atomic import write_png
from segmenter_fast.io.images import ImageSource, normalise, read_image
from segmenter_fast.reference import ReferenceSegmenter
from segmenter_fast.visualize import default_palette, overlay

from .agreement import rms, share
from .cases import compiled
from .peers import with_sdpa
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
    peer_error: float
    """Root mean square difference of the peer's logits from the reference's, which have unit variance over classes."""
    error: float
    """The same for the fast model."""
    peer_labels: float
    """Share of the peer's labels that equal the reference's."""
    labels: float
    """The same for the fast model."""
    own_labels: float
    """Share of the fast model's labels that are the argmax of its own logits."""
    overlay: Path

    @property
    def agrees(self) -> bool:
        """Whether the fast model errs at most twice as much as the peer does in the same dtype."""
        return self.error <= 2 * self.peer_error + 1e-4 and self.own_labels >= 0.999


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
        peer_model, fast, low = with_sdpa(reference, dtype), model.optimize(dtype), images.to(dtype)
        peer = compiled(peer_model.segment, device)
        logits, fast_logits, labels = reference(images), fast(low), fast.segment(low)
        expected = logits.argmax(1)
        peer_error, error = rms(peer_model(low) - logits), rms(fast_logits - logits)
        peer_labels, own_labels = share(peer(low) == expected), share(labels == fast_logits.argmax(1))
        del logits, fast_logits
        times = measure(
            {
                "reference": [lambda: reference.segment(images)],
                "peer": [lambda: peer(low)],
                "fast": [lambda: fast.segment(low)],
            },
            device,
            seconds=seconds,
        )
    good = {}
    for name, time in times.items():
        if isinstance(time, Failure):
            raise RuntimeError(f"{variant}: the {name} model could not be timed: {time.note}")
        good[name] = time
    path = out / f"{variant}.png"
    write_png(overlay(pixels, labels[0].cpu().numpy(), default_palette(model.config.num_classes)), path)
    return Comparison(
        variant,
        dtype,
        good["reference"],
        good["peer"],
        good["fast"],
        peer_error,
        error,
        peer_labels,
        share(labels == expected),
        own_labels,
        path,
    )


def table(comparisons: Sequence[Comparison]) -> Table:
    """What ``run_demo`` found, a row for each model of a variant."""
    dtypes = ", ".join(sorted({str(row.dtype).removeprefix("torch.") for row in comparisons}))
    result = Table(
        title=f"one {SIDE} x {SIDE} photograph",
        caption=f"reference: float32; peer: SDPA and torch.compile, {dtypes}; fast: optimize(), {dtypes}",
    )
    result.add_column("variant", no_wrap=True)
    result.add_column("model")
    for column in ("images/s", "speed-up\nof fast", "error", "equal\nlabels"):
        result.add_column(column, justify="right")
    for row in comparisons:
        models = (
            ("reference", row.reference, "", ""),
            ("peer", row.peer, f"{row.peer_error:.1e}", f"{row.peer_labels:.1%}"),
            ("fast", row.fast, f"{row.error:.1e}", f"{row.labels:.1%}"),
        )
        for number, (model, time, error, labels) in enumerate(models):
            speed_up = "" if model == "fast" else f"{time.median_ms / row.fast.median_ms:.1f}x"
            images_s = f"{1000 / time.median_ms:.2f}"
            result.add_row("" if number else row.variant, model, images_s, speed_up, error, labels)
        result.add_section()
    return result
