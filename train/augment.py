"""Augmentation of images and labels together: mmsegmentation's pipeline, which Segmenter is trained with.

Its order: resize by a random ratio, random crop in which no class fills too much, mirror, photometric distortion,
normalise, pad. Sources: mmsegmentation's ``Resize``, ``RandomCrop``, ``RandomFlip``, ``PhotoMetricDistortion`` and
``Pad`` with the official program's settings. As there, images are resized bilinearly without antialiasing, labels to
the nearest; colours are not rounded to integers between the steps, and the longer side has no limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as TF
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's operators do not load
    raise ImportError(
        f"training needs a torchvision that fits the installed torch: pip install 'segmenter-fast[train]' ({error})"
    ) from error

CROPS = 10
"""Crops that are tried to find one in which no class fills too much; the next is taken as it is."""
BRIGHTNESS = 32 / 255
"""Largest number that is added to colours within 0 to 1."""
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 180
"""Largest turn of hues, in whole turns."""


@dataclass(frozen=True)
class TrainTransform:
    """``(H, W, C)`` pixels and ``(H, W)`` labels -> ``(C, crop, crop)`` float32 and ``(crop, crop)`` int64.

    All randomness comes from the generator given.
    """

    resize: int
    """Pixels of the smaller side at ratio 1."""
    crop: int
    """Side of the result in pixels."""
    mean: Sequence[float]
    std: Sequence[float]
    """Of colours within 0 to 1, as in the model's configuration."""
    ratios: tuple[float, float] = (0.5, 2.0)
    """The ratio is uniform between these two."""
    max_share: float = 0.75
    """Largest share of one class among a crop's labelled pixels; 1 takes the first crop."""
    flip: bool = True
    """Mirror half of the images."""
    photometric: bool = True
    ignore_index: int = 255
    """Label of pixels outside the image; their colour is the mean."""

    def __call__(self, image: np.ndarray, labels: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        size = resized(labels.shape, max(1, int(self.resize * _uniform(*self.ratios, generator))))
        target = resize_labels(torch.from_numpy(np.require(labels, requirements=["C", "W"])), size)
        top, left = random_crop(target, self.crop, self.max_share, self.ignore_index, generator)
        crop = top, left, min(size[0], self.crop), min(size[1], self.crop)
        target = TF.crop_image(target, *crop)

        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        pixels = pixels.permute(2, 0, 1)  # channels-last memory, in which uint8 resizing is fastest
        pixels = TF.resize_image(pixels, list(size), InterpolationMode.BILINEAR, antialias=False)
        pixels = TF.crop_image(pixels, *crop)
        if self.flip and _coin(generator):
            pixels, target = TF.horizontal_flip_image(pixels), TF.horizontal_flip_image(target)
        colors = pixels.contiguous().to(torch.float32)
        if pixels.dtype == torch.uint8:
            colors.div_(255)
        if self.photometric:
            colors = photometric(colors, generator)
        colors = TF.normalize_image(colors, list(self.mean), list(self.std), inplace=True)

        padding = [0, 0, self.crop - target.shape[1], self.crop - target.shape[0]]  # left, top, right, bottom
        if any(padding):
            colors = TF.pad_image(colors, padding, fill=0)
            target = TF.pad_image(target[None], padding, fill=self.ignore_index)[0]
        return colors, target.to(torch.int64)


def resized(size: Sequence[int], smaller_side: int) -> tuple[int, int]:
    """Scale ``(H, W)`` to this smaller side; the other is rounded, to at least a pixel."""
    factor = smaller_side / min(size)
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """``(H, W)`` labels of any integer dtype -> ``size``, each pixel the label at ``floor(position * H / height)``."""
    rows, columns = (
        torch.arange(new).mul_(old).div_(new, rounding_mode="floor")
        for old, new in zip(labels.shape, size, strict=True)
    )
    return labels.index_select(0, rows).index_select(1, columns)


def random_crop(
    labels: Tensor, crop: int, max_share: float, ignore_index: int, generator: torch.Generator
) -> tuple[int, int]:
    """Draw top and left of a crop in which no class fills ``max_share`` of the labelled pixels, in ``CROPS`` attempts.

    One class alone, and no labelled pixel, count as too much. Where the image is no larger than the crop there is only
    one place, and nothing is tried.
    """
    margins = [max(side - crop, 0) for side in labels.shape]
    top, left = (_below(margin + 1, generator) for margin in margins)
    if max_share == 1 or not any(margins):
        return top, left
    for _ in range(CROPS):
        counts = torch.bincount(labels[top : top + crop, left : left + crop].reshape(-1))
        counts[ignore_index:][:1] = 0
        if counts.max() < max_share * counts.sum():
            break
        top, left = (_below(margin + 1, generator) for margin in margins)
    return top, left


def photometric(colors: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of ``(3, H, W)`` within 0 to 1, each in half of the cases.

    Contrast, which is a factor, comes before saturation and hue or after them, with equal odds.
    """
    if _coin(generator):
        colors = colors.add(_uniform(-BRIGHTNESS, BRIGHTNESS, generator)).clamp_(0, 1)
    contrast_first = _coin(generator)
    if contrast_first and _coin(generator):
        colors = colors.mul(_uniform(*CONTRAST, generator)).clamp_(0, 1)
    if _coin(generator):
        colors = saturate(colors, _uniform(*SATURATION, generator))
    if _coin(generator):
        colors = TF.adjust_hue_image(colors, _uniform(-HUE, HUE, generator))
    if not contrast_first and _coin(generator):
        colors = colors.mul(_uniform(*CONTRAST, generator)).clamp_(0, 1)
    return colors


def saturate(colors: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, up to 1, without a conversion to HSV.

    There a channel is ``value * (1 - saturation * weight)`` with a weight that depends on the hue alone.
    """
    value, least = colors.amax(0), colors.amin(0)
    most = value / (value - least).clamp_(min=1e-6)  # the factor that makes the saturation 1
    return value - (value - colors) * most.clamp_(max=factor)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _coin(generator: torch.Generator) -> bool:
    return _below(2, generator) == 1
