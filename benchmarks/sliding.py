"""Sliding windows without a canvas against the canvas method: ``python -m segmenter_fast.benchmarks.sliding``.

Writes ``<out>/<device>/sliding.json`` after each case: time, peak memory, agreement. The canvas method is the official
program's: full-size logits of each window are added up on a ``K x H x W`` canvas, which is divided, resized, and for
several scales and flips turned into probabilities that are added up. The model, a small one with random weights, is the
same, and its time is part of both. A canvas above ``--largest-canvas`` is not tried: it would push out what else runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import Segmenter, create_model
from segmenter_fast.inference import slide
from segmenter_fast.inference.rows import Rows, image_views

from .cases import OURS, Case, Variant
from .device import resolve
from .run import Run, add_options

CLASSES, WINDOW, STRIDE, BATCH = 150, 512, 480, 2
# Small, so that what surrounds the model shows.
VARIANT = "seg_t_mask_16"
SMALL: dict[str, Any] = {"depth": 2, "decoder_depth": 1}


def canvas(model: Segmenter, image: Tensor, window: int, stride: int) -> Tensor:
    """``(1, 3, H, W)`` -> ``(K, H, W)``: the mean of the logits of the windows over each pixel."""
    height, width = image.shape[2:]
    tops, lefts = ([*range(0, side - window, stride), side - window] for side in (height, width))
    places = [(slice(top, top + window), slice(left, left + window)) for top in tops for left in lefts]
    total, count = image.new_zeros(model.config.num_classes, height, width), image.new_zeros(height, width)
    for start in range(0, len(places), BATCH):
        batch = places[start : start + BATCH]
        for (ys, xs), logits in zip(batch, model(torch.cat([image[..., ys, xs] for ys, xs in batch])), strict=True):
            total[:, ys, xs] += logits
            count[ys, xs] += 1
    return total.div_(count)


def views(image: Tensor, scales: tuple[float, ...], flip: bool) -> tuple[list[Tensor], list[bool]]:
    """Return the ``images`` and ``flips`` of ``slide``."""
    rows, flips = image_views(Rows.of_tensor(image), scales, flip)
    return [view.read(0, view.height) for view in rows], flips


@torch.inference_mode()
def canvas_votes(model: Segmenter, image: Tensor, scales: tuple[float, ...], flip: bool) -> Tensor:
    """``(K, H, W)``: the mean logits; of several scales and flips the sum of their softmaxes."""
    images, flips = views(image, scales, flip)
    size = image.shape[2:]
    total: Tensor | None = None
    for one, mirrored in zip(images, flips, strict=True):
        votes = canvas(model, one, WINDOW, STRIDE)
        if votes.shape[1:] != size:
            votes = F.interpolate(votes[None], size=size, mode="bilinear", align_corners=False)[0]
        if mirrored:
            votes = votes.flip(2)
        if len(images) > 1:
            votes = votes.softmax(0)
        total = votes if total is None else total.add_(votes)
    assert total is not None
    return total


def make_case(
    device: torch.device,
    side: int,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    largest_canvas: float = float("inf"),
) -> Case:
    """Labels of one ``side x side`` image. Judged where at most two rows of windows reach, on a canvas of these."""
    torch.manual_seed(0)
    model = create_model(VARIANT, num_classes=CLASSES, image_size=WINDOW, **SMALL).to(device).eval()
    plain = scales == (1.0,) and not flip

    def make_inputs(generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(1, 3, side, side, device=device, generator=generator),)

    def ours(image: Tensor) -> Tensor:
        images, flips = views(image, scales, flip)
        return slide(model, images, flips, (side, side), WINDOW, STRIDE, BATCH)

    def judge(inputs: tuple[Any, ...]) -> Any:
        (image,) = inputs
        part = image[:, :, : STRIDE + WINDOW] if plain and side > STRIDE + WINDOW else image
        rows = min(2 * STRIDE, side - WINDOW) if len(part[0, 0]) < side else side
        votes = canvas_votes(model, part, scales, flip)[:, :rows]
        best = votes.amax(0)

        def error(labels: Tensor) -> float:
            if labels.shape != (side, side):
                return float("inf")
            chosen = votes.gather(0, labels[:rows].long()[None])[0]
            return ((best - chosen).max() / best.abs().max()).item()

        return error

    area = CLASSES * side**2 * 4
    needs = int(area * (1 if plain else max(scales) ** 2 + 2))  # one canvas; its resized form and the sum
    eager: Variant | str = Variant(lambda image: canvas_votes(model, image, scales, flip).argmax(0), needs_bytes=needs)
    if needs > largest_canvas:
        eager = f"the canvas takes {needs / 2**30:.1f} GiB, more than --largest-canvas"
    patches = sum(scale**2 for scale in scales) * (1 + flip) * area // model.config.patch_size**2
    return Case(
        parameters={"side": side, "K": CLASSES, "window": WINDOW, "stride": STRIDE, "model": VARIANT, **SMALL}
        | ({} if plain else {"scales": ", ".join(map(str, scales)), "flip": flip}),
        device=device,
        dtype=torch.float32,
        make_inputs=make_inputs,
        judge=judge,
        variants={"eager": eager, OURS: Variant(ours)},
        bytes_moved=int(patches + side**2),
    )


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a case was refused because our labels were wrong."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.sliding", description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="*", default=[4096, 2048, 1024], help="of images (%(default)s)")
    parser.add_argument("--largest-canvas", type=float, default=4.0, help="GiB (%(default)s)")
    add_options(parser)
    options = parser.parse_args(arguments)
    if wrong := [side for side in options.sides if side < WINDOW]:
        parser.error(f"sides must be at least the window, {WINDOW}, got {wrong}")
    try:
        device = resolve(options.device)
    except ValueError as error:
        parser.error(str(error))
    start = time.monotonic()
    run = Run.begin(device, (torch.float32,), options.out, options.quick, 0.5 if options.quick else 2.0)
    largest = options.largest_canvas * 2**30
    cases = [
        make_case(device, side, largest_canvas=largest) for side in options.sides if side <= 1024 or not options.quick
    ]
    if not options.quick:
        cases.append(make_case(device, 1024, (0.75, 1.0, 1.25), True, largest))
    deadline = None if options.budget is None else start + options.budget
    return 1 if run.cases("sliding", cases, deadline) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the cases that were finished are written")
