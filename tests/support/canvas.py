"""The canvas method, in a few lines: the oracle of sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.inference.rows import Rows, image_views


def canvas_logits(
    model: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    flips: Sequence[bool],
    size: tuple[int, int],
    window: int,
    stride: int,
) -> Tensor:
    """``(S, K, H, W)``: per image the mean logits of the windows over each pixel, resized and turned back."""
    outputs = []
    for image, flip in zip(images, flips, strict=True):
        height, width = image.shape[2:]
        tops, lefts = ([*range(0, max(side - window, 0), stride), max(side - window, 0)] for side in (height, width))
        total: Tensor | None = None
        count = torch.zeros(height, width, dtype=image.dtype)
        for top in tops:
            for left in lefts:
                place = (..., slice(top, top + window), slice(left, left + window))
                logits = model(image[place])[0]
                total = logits.new_zeros(len(logits), height, width) if total is None else total
                total[place] += logits
                count[place] += 1
        mean = F.interpolate((total / count)[None], size, mode="bilinear")[0]
        outputs.append(mean.flip(2) if flip else mean)
    return torch.stack(outputs)


def scaled_and_flipped(
    image: Tensor, scales: Sequence[float], flip: bool = False, enlarge_to: int | None = None
) -> tuple[list[Tensor], list[bool]]:
    """``(1, 3, h, w)`` -> the ``images`` and ``flips`` of ``slide``."""
    rows, flips = image_views(Rows.of_tensor(image), scales, flip, enlarge_to)
    return [view.read(0, view.height) for view in rows], flips
