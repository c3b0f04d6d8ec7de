"""Sliding-window inference with several scales and flips, composed as the official program composes it.

Window logits are averaged per pixel, the average is resized bilinearly to the original size and flipped back, and the
softmaxes of all scales and flips are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Pair

_OUTPUTS = ("labels", "probabilities")


@torch.inference_mode()
def slide(
    model: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    flips: Sequence[bool],
    size: Pair,
    window: int = 512,
    stride: int = 512,
    batch_size: int = 2,
    output: str = "labels",
) -> Tensor:
    """Segments one image, given at several scales and mirrored or not, window by window.

    An image whose smaller side is below the window is enlarged until that side equals the window, unless the model's
    configuration says ``upscale_small_images=False``: windows are then cut to the image.

    Args:
        model: any callable from normalised ``(B, 3, h, w)`` to ``(B, K, h, w)`` logits, in evaluation mode.
        images: ``(1, 3, h, w)`` floating point tensors on the model's device, one for each scale and flip.
        flips: which of the images are mirrored left to right.
        size: (height, width) in pixels of the result, the original image's.
        window: side in pixels of the square windows.
        stride: pixels from one window to the next; the last window of a row or column ends at the border.
        batch_size: windows that go through the model at once.
        output: "labels" or "probabilities".

    Returns:
        "labels": ``(H, W)``, uint8 up to 256 classes and int32 above; ties go to the lowest class.
        "probabilities": ``(K, H, W)`` in float32, or float64 for a float64 model.

    Raises:
        ValueError, TypeError: an argument out of range or of a wrong shape or dtype, pixels that are NaN or infinite,
            and a stride above the window, which would leave pixels without a prediction.

    Source: the official program's inference, and mmsegmentation's where images are not enlarged.
    """
    check_windows(window, stride, batch_size)
    _check_images(images, flips, size)
    if output not in _OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(_OUTPUTS)}, got {output!r}")

    enlarge = enlarges_small_images(model)
    total: Tensor | None = None
    for image, flip in zip(images, flips, strict=True):
        if enlarge:
            image = _resized(image, enlarged_size((image.shape[2], image.shape[3]), window))
        logits = _resized(_window_mean(model, image, window, stride, batch_size)[None], size)[0]
        if flip:
            logits = logits.flip(2)
        if output == "labels" and len(images) == 1:
            return _labels(logits)  # the softmax is monotonic
        probabilities = logits.softmax(0)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    total /= len(images)
    return total if output == "probabilities" else _labels(total)


def scaled_and_flipped(image: Tensor, scales: Sequence[float], flip: bool) -> tuple[list[Tensor], list[bool]]:
    """``(1, 3, H, W)`` -> the ``images`` and ``flips`` of ``slide``: every scale plain and, with ``flip``, mirrored.

    Raises:
        ValueError: no scale, or one that is not positive or leaves nothing of the image.
    """
    if not scales:
        raise ValueError("scales must name at least one scale, got none")
    images, flips = [], []
    for scale in scales:
        if not 0 < scale < float("inf") or min(image.shape[2:]) * scale < 1:
            given = f"{scale} for an image of {image.shape[2]} x {image.shape[3]} pixels"
            raise ValueError(f"scales must be positive, finite and leave at least one pixel, got {given}")
        # scale_factor and not the size: the sampling points depend on it where the side is not a multiple
        scaled = image if scale == 1 else F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        images += [scaled, scaled.flip(3)] if flip else [scaled]
        flips += [False, True] if flip else [False]
    return images, flips


def enlarged_size(size: Pair, window: int) -> Pair:
    """(height, width) after enlarging so that the smaller side equals the window; the other is truncated."""
    height, width = size
    if min(size) >= window:
        return size
    if height < width:
        return window, int(width / height * window)
    return int(height / width * window), window


def enlarges_small_images(model: object) -> bool:
    """Whether the model's origin enlarges images below the window; the official program, the default, does."""
    return getattr(getattr(model, "config", None), "upscale_small_images", True)


def fits_one_window(model: object, size: Pair, window: int) -> bool:
    """Whether a single window, without any resizing, covers a whole image of ``size``."""
    resized = enlarges_small_images(model) and enlarged_size(size, window) != size
    return max(size) <= window and not resized


def check_windows(window: int, stride: int, batch_size: int) -> None:
    """What ``slide`` says of these arguments.

    Raises:
        ValueError: one of them is below 1, or the stride above the window.
    """
    for name, given in (("window", window), ("stride", stride), ("batch_size", batch_size)):
        if given < 1:
            raise ValueError(f"{name} must be at least 1, got {given}")
    if stride > window:
        raise ValueError(
            f"stride must be at most the window, {window}, or pixels between windows get no label; got {stride}"
        )


def _anchors(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side: every stride below the last one, which ends at the border."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def _window_mean(model: Callable[[Tensor], Tensor], image: Tensor, window: int, stride: int, batch_size: int) -> Tensor:
    """``(1, 3, H, W)`` -> ``(K, H, W)``: for each pixel the mean of the logits of the windows that cover it."""
    height, width = image.shape[2:]
    tops, lefts = _anchors(height, window, stride), _anchors(width, window, stride)
    anchors = [(top, left) for top in tops for left in lefts]
    canvas = image.new_empty(0)
    for start in range(0, len(anchors), batch_size):
        batch = anchors[start : start + batch_size]
        crops = torch.cat([image[..., top : top + window, left : left + window] for top, left in batch])
        logits = model(crops)
        if logits.ndim != 4 or logits.shape[0] != len(crops) or logits.shape[2:] != crops.shape[2:]:
            wanted = f"({len(crops)}, K, {crops.shape[2]}, {crops.shape[3]})"
            raise ValueError(f"model must give logits {wanted} for its windows, got {tuple(logits.shape)}")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if len(anchors) == 1:
            return logits[0].to(dtype)
        if start == 0:
            canvas = logits.new_zeros((logits.shape[1], height, width), dtype=dtype)
        for part, (top, left) in zip(logits, batch, strict=True):
            canvas[:, top : top + window, left : left + window] += part
    rows, columns = (_cover(*axis, window).to(canvas) for axis in ((tops, height), (lefts, width)))
    return canvas.div_(rows[:, None] * columns)


def _cover(anchors: list[int], side: int, window: int) -> Tensor:
    """``(side,)``: the number of windows over each pixel along one side."""
    cover = torch.zeros(side)
    for anchor in anchors:
        cover[anchor : anchor + window] += 1
    return cover


def _resized(images: Tensor, size: Pair) -> Tensor:
    """Bilinear, and nothing at all where the size is right already."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _labels(scores: Tensor) -> Tensor:
    """``(K, H, W)`` -> ``(H, W)``."""
    return scores.argmax(0).to(torch.uint8 if scores.shape[0] <= 256 else torch.int32)


def _check_images(images: Sequence[Tensor], flips: Sequence[bool], size: Pair) -> None:
    if not len(images):
        raise ValueError("images must hold at least one (1, 3, h, w) tensor, got none")
    if len(flips) != len(images):
        raise ValueError(f"flips must have one entry for each of the {len(images)} images, got {len(flips)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, each at least 1, got {tuple(size)}")
    for index, image in enumerate(images):
        if image.ndim != 4 or image.shape[:2] != (1, 3) or min(image.shape[2:]) < 1:
            raise ValueError(f"images[{index}] must be (1, 3, h, w), got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"images[{index}] must be floating point and normalised, got {image.dtype}")
        if not image.isfinite().all():
            raise ValueError(f"images[{index}] must be finite, but has pixels that are NaN or infinite")
