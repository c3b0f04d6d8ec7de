"""Cases of sliding windows: ours without a canvas against the official program's canvas.

The canvas method adds up full-size logits of each window on a ``K x H x W`` canvas and divides it. Both use the same
small model with random weights, whose time counts for both. A canvas above LARGEST_CANVAS is not tried, as it would
push other programs out of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segmenter_fast import Segmenter, create_model
from segmenter_fast.inference import slide

from ..case import OURS, Case, Variant

CLASSES, WINDOW, STRIDE, BATCH = 150, 512, 480, 2
# Small, so that the time around the model shows.
VARIANT = "seg_t_mask_16"
SMALL: dict[str, Any] = {"depth": 2, "decoder_depth": 1}
LARGEST_CANVAS = 4 * 2**30


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [sliding_case(device, side) for side in ((1024,) if quick else (4096, 2048, 1024))]


def sliding_case(device: torch.device, side: int) -> Case:
    """Labels of one ``side x side`` image. Judged where at most two rows of windows reach, on a canvas of these."""
    torch.manual_seed(0)
    model = create_model(VARIANT, num_classes=CLASSES, image_size=WINDOW, **SMALL).to(device).eval()

    def judge(inputs: tuple[Any, ...]) -> Any:
        rows = min(2 * STRIDE, side - WINDOW) if side > STRIDE + WINDOW else side
        scores = _canvas(model, inputs[0][:, :, : STRIDE + WINDOW])[:, :rows]
        best = scores.amax(0)

        def error(labels: Tensor) -> float:
            if labels.shape != (side, side):
                return float("inf")
            chosen = scores.gather(0, labels[:rows].long()[None])[0]
            return ((best - chosen).max() / best.abs().max()).item()

        return error

    canvas_bytes = CLASSES * side**2 * 4
    eager: Variant | str = Variant(lambda image: _canvas(model, image).argmax(0), needs_bytes=canvas_bytes)
    if canvas_bytes > LARGEST_CANVAS:
        eager = f"the canvas takes {canvas_bytes / 2**30:.1f} GiB, more than {LARGEST_CANVAS / 2**30:.1f} GiB"
    return Case(
        parameters={"side": side, "K": CLASSES, "window": WINDOW, "stride": STRIDE, "model": VARIANT, **SMALL},
        device=device,
        dtype=torch.float32,
        make_inputs=lambda generator: (torch.randn(1, 3, side, side, device=device, generator=generator),),
        judge=judge,
        variants={
            "eager": eager,
            OURS: Variant(lambda image: slide(model, [image], [False], (side, side), WINDOW, STRIDE, BATCH)),
        },
        bytes_moved=canvas_bytes // model.config.patch_size**2 + side**2,
    )


@torch.inference_mode()
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
