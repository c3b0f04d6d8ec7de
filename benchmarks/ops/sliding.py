"""Cases of sliding windows: ours without a canvas against the official program's canvas.

The canvas method adds up full-size logits of each window on a ``K x H x W`` canvas, divides and resizes it, and for
several scales and flips adds up the probabilities. Both use the same small model with random weights, whose time counts
for both. A canvas above LARGEST_CANVAS is not tried, as it would push other programs out of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import Segmenter, create_model
from segmenter_fast.inference import slide
from segmenter_fast.inference.rows import Rows, image_views

from ..case import OURS, Case, Variant

CLASSES, WINDOW, STRIDE, BATCH = 150, 512, 480, 2
# Small, so that the time around the model shows.
VARIANT = "seg_t_mask_16"
SMALL: dict[str, Any] = {"depth": 2, "decoder_depth": 1}
LARGEST_CANVAS = 4 * 2**30


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        return [sliding_case(device, 1024)]
    cases = [sliding_case(device, side) for side in (4096, 2048, 1024)]
    return [*cases, sliding_case(device, 1024, (0.75, 1.0, 1.25), True)]


def sliding_case(device: torch.device, side: int, scales: tuple[float, ...] = (1.0,), flip: bool = False) -> Case:
    """Labels of one ``side x side`` image. Judged where at most two rows of windows reach, on a canvas of these."""
    torch.manual_seed(0)
    model = create_model(VARIANT, num_classes=CLASSES, image_size=WINDOW, **SMALL).to(device).eval()
    plain = scales == (1.0,) and not flip

    def make_inputs(generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(1, 3, side, side, device=device, generator=generator),)

    def ours(image: Tensor) -> Tensor:
        images, flips = _views(image, scales, flip)
        return slide(model, images, flips, (side, side), WINDOW, STRIDE, BATCH)

    def judge(inputs: tuple[Any, ...]) -> Any:
        (image,) = inputs
        part = image[:, :, : STRIDE + WINDOW] if plain and side > STRIDE + WINDOW else image
        rows = min(2 * STRIDE, side - WINDOW) if len(part[0, 0]) < side else side
        votes = _canvas_votes(model, part, scales, flip)[:, :rows]
        best = votes.amax(0)

        def error(labels: Tensor) -> float:
            if labels.shape != (side, side):
                return float("inf")
            chosen = votes.gather(0, labels[:rows].long()[None])[0]
            return ((best - chosen).max() / best.abs().max()).item()

        return error

    canvas_bytes = CLASSES * side**2 * 4
    needs = int(canvas_bytes * (1 if plain else max(scales) ** 2 + 2))  # one canvas; its resized form and the sum
    eager: Variant | str = Variant(lambda image: _canvas_votes(model, image, scales, flip).argmax(0), needs_bytes=needs)
    if needs > LARGEST_CANVAS:
        eager = f"the canvas takes {needs / 2**30:.1f} GiB, more than {LARGEST_CANVAS / 2**30:.1f} GiB"
    patches = sum(scale**2 for scale in scales) * (1 + flip) * canvas_bytes // model.config.patch_size**2
    parameters = {"side": side, "K": CLASSES, "window": WINDOW, "stride": STRIDE, "model": VARIANT, **SMALL}
    return Case(
        parameters=parameters | ({} if plain else {"scales": ", ".join(map(str, scales)), "flip": flip}),
        device=device,
        dtype=torch.float32,
        make_inputs=make_inputs,
        judge=judge,
        variants={"eager": eager, OURS: Variant(ours)},
        bytes_moved=int(patches + side**2),
    )


def _views(image: Tensor, scales: tuple[float, ...], flip: bool) -> tuple[list[Tensor], list[bool]]:
    """The ``images`` and ``flips`` of ``slide``."""
    rows, flips = image_views(Rows.of_tensor(image), scales, flip)
    return [view.read(0, view.height) for view in rows], flips


@torch.inference_mode()
def _canvas_votes(model: Segmenter, image: Tensor, scales: tuple[float, ...], flip: bool) -> Tensor:
    """``(K, H, W)``: the mean logits; of several scales and flips the sum of their softmaxes."""
    images, flips = _views(image, scales, flip)
    size = image.shape[2:]
    total: Tensor | None = None
    for one, mirrored in zip(images, flips, strict=True):
        votes = _canvas(model, one)
        if votes.shape[1:] != size:
            votes = F.interpolate(votes[None], size=size, mode="bilinear", align_corners=False)[0]
        if mirrored:
            votes = votes.flip(2)
        if len(images) > 1:
            votes = votes.softmax(0)
        total = votes if total is None else total.add_(votes)
    assert total is not None
    return total


def _canvas(model: Segmenter, image: Tensor) -> Tensor:
    """``(1, 3, H, W)`` -> ``(K, H, W)``: the mean of the logits of the windows over each pixel."""
    height, width = image.shape[2:]
    tops, lefts = ([*range(0, side - WINDOW, STRIDE), side - WINDOW] for side in (height, width))
    places = [(slice(top, top + WINDOW), slice(left, left + WINDOW)) for top in tops for left in lefts]
    total, count = image.new_zeros(model.config.num_classes, height, width), image.new_zeros(height, width)
    for start in range(0, len(places), BATCH):
        batch = places[start : start + BATCH]
        for (ys, xs), logits in zip(batch, model(torch.cat([image[..., ys, xs] for ys, xs in batch])), strict=True):
            total[:, ys, xs] += logits
            count[ys, xs] += 1
    return total.div_(count)
