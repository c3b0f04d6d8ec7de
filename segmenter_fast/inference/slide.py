"""Sliding-window inference with several scales and flips, composed as the official program composes it.

Window logits are averaged per pixel, the average is resized bilinearly to the original size and flipped back, and the
softmaxes of all scales and flips are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Pair
from .bands import WholeImage, slide_rows
from .settings import Settings, enlarges_small_images


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
    Settings(window, stride, batch_size=batch_size)
    _check_images(images, flips, size)
    enlarge = enlarges_small_images(model)
    rows = []
    for image in images:
        if enlarge:
            image = _resized(image, enlarged_size((image.shape[2], image.shape[3]), window))
        rows.append(WholeImage(image))
    result: Tensor | None = None
    for top, band in slide_rows(model, rows, flips, size, window, stride, batch_size, output):
        if result is None:
            result = band.new_empty((*band.shape[:-2], *size))
        result[..., top : top + band.shape[-2], :] = band
    assert result is not None
    return result


def scaled_and_flipped(image: Tensor, scales: Sequence[float], flip: bool) -> tuple[list[Tensor], list[bool]]:
    """``(1, 3, H, W)`` -> the ``images`` and ``flips`` of ``slide``: every scale plain and, with ``flip``, mirrored.

    Raises:
        ValueError: no scale, or one that is not positive or leaves nothing of the image.
    """
    check_scales(scales, (image.shape[2], image.shape[3]))
    images, flips = [], []
    for scale in scales:
        # scale_factor and not the size: the sampling points depend on it where the side is not a multiple
        scaled = image if scale == 1 else F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        images += [scaled, scaled.flip(3)] if flip else [scaled]
        flips += [False, True] if flip else [False]
    return images, flips


def check_scales(scales: Sequence[float], size: Pair) -> None:
    """What ``scaled_and_flipped`` says of the scales of an image of ``size``.

    Raises:
        ValueError: no scale, or one that is not positive or leaves nothing of the image.
    """
    if not scales:
        raise ValueError("scales must name at least one scale, got none")
    for scale in scales:
        if not 0 < scale < float("inf") or min(size) * scale < 1:
            given = f"{scale} for an image of {size[0]} x {size[1]} pixels"
            raise ValueError(f"scales must be positive, finite and leave at least one pixel, got {given}")


def enlarged_size(size: Pair, window: int) -> Pair:
    """(height, width) after enlarging so that the smaller side equals the window; the other is truncated."""
    height, width = size
    if min(size) >= window:
        return size
    if height < width:
        return window, int(width / height * window)
    return int(height / width * window), window


def _resized(images: Tensor, size: Pair) -> Tensor:
    """Bilinear, and nothing at all where the size is right already."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


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
