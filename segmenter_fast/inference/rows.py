"""Images as the model takes them, read a band of rows at a time: normalised, scaled, mirrored, enlarged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Pair
from ..io.images import Raster, normalise


@dataclass(frozen=True)
class Rows:
    """One image, floating point and normalised, whose rows are read on demand."""

    height: int
    width: int
    device: torch.device
    read: Callable[[int, int], Tensor]
    """(top, bottom) -> ``(1, C, bottom - top, width)`` on the device."""
    whole: Tensor | None = None
    """``(1, C, height, width)`` of an image in memory."""

    @classmethod
    def of_tensor(cls, image: Tensor) -> Rows:
        """Rows of ``(1, C, h, w)``."""
        height, width = image.shape[2:]
        return cls(height, width, image.device, lambda top, bottom: image[:, :, top:bottom], image)

    @classmethod
    def of_raster(cls, raster: Raster, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Rows:
        """Rows in float32 that are normalised as they are read; see ``normalise``."""

        def read(top: int, bottom: int) -> Tensor:
            return normalise(raster.read(top, bottom), mean, std, device)

        return cls(raster.height, raster.width, device, read)

    def mirrored(self) -> Rows:
        """Rows from right to left."""
        if self.whole is not None:
            return Rows.of_tensor(self.whole.flip(3))
        return replace(self, read=lambda top, bottom: self.read(top, bottom).flip(3))

    def resized(self, to: float | Pair) -> Rows:
        """Rows resized bilinearly, as ``F.interpolate`` resizes a whole image, by a factor or to (height, width).

        Resizing is separable, so a band needs only the source rows under it.
        """
        if self.whole is not None:
            return Rows.of_tensor(_interpolate(self.whole, to))
        # Recover PyTorch's weights, whose sampling points it rounds in float32, by resizing one-hot rows.
        marks = F.one_hot(torch.arange(self.height, device=self.device) % 3, 3).T.float()[None, :, :, None]
        weights = _interpolate(marks, to, horizontally=False)[0, :, :, 0].cpu()
        height = weights.shape[1]
        width = _interpolate(torch.empty(1, 1, 1, self.width), to, vertically=False).shape[3]
        ratio = 1 / to if isinstance(to, float) else self.height / to[0]
        centre = ((torch.arange(height, dtype=torch.float64) + 0.5) * ratio - 0.5).clamp(0, self.height - 1)
        near = centre.floor().long() + torch.tensor([-1, 0, 1])[:, None]  # (3, height)
        weights = weights.gather(0, near % 3)
        near = near.clamp(0, self.height - 1)

        def read(top: int, bottom: int) -> Tensor:
            sources, shares = near[:, top:bottom], weights[:, top:bottom]
            used = sources[shares != 0]
            first, last = int(used.min()), int(used.max())
            wide = _interpolate(self.read(first, last + 1), to, vertically=False)
            sources = (sources - first).clamp(0, last - first).to(wide.device)
            shares = shares[:, :, None].to(wide)
            band = wide.index_select(2, sources[0]).mul_(shares[0])
            for source, share in zip(sources[1:], shares[1:], strict=True):
                band.addcmul_(wide.index_select(2, source), share)
            return band

        return Rows(height, width, self.device, read)

    def enlarged(self, window: int) -> Rows:
        """Rows whose smaller side is at least the window; the other side is truncated to whole pixels."""
        size = self.height, self.width
        return self if min(size) >= window else self.resized(enlarged_size(size, window))


def enlarged_size(size: Pair, window: int) -> Pair:
    """Return (height, width) with a smaller side of at least the window; the other is truncated to whole pixels."""
    height, width = size
    if min(size) >= window:
        return size
    return (window, int(width / height * window)) if height < width else (int(height / width * window), window)


def image_views(
    image: Rows, scales: Sequence[float], flip: bool = False, enlarge_to: int | None = None
) -> tuple[list[Rows], list[bool]]:
    """Return the ``images`` and ``flips`` of ``slide_rows``: every scale plain and, with ``flip``, mirrored.

    Args:
        enlarge_to: a window up to which smaller scales are enlarged; None for no enlarging.

    Raises:
        ValueError: a scale that leaves no pixel of the image.
    """
    views: list[Rows] = []
    for scale in scales:
        if min(image.height, image.width) * scale < 1:
            given = f"{scale} for an image of {image.height} x {image.width} pixels"
            raise ValueError(f"scales must leave at least one pixel, got {given}")
        scaled = image if scale == 1 else image.resized(float(scale))
        views += [scaled, scaled.mirrored()] if flip else [scaled]
    if enlarge_to is not None:
        views = [view.enlarged(enlarge_to) for view in views]
    return views, [False, True] * len(scales) if flip else [False] * len(scales)


def _interpolate(images: Tensor, to: float | Pair, vertically: bool = True, horizontally: bool = True) -> Tensor:
    if isinstance(to, float):
        factors = to if vertically else 1.0, to if horizontally else 1.0
        return F.interpolate(images, scale_factor=factors, mode="bilinear", align_corners=False)
    size = to[0] if vertically else images.shape[2], to[1] if horizontally else images.shape[3]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
