"""A raster as the model takes it: bands of normalised pixels, scaled and mirrored without the whole image.

Scales are those of ``F.interpolate(scale_factor=..., mode="bilinear", align_corners=False)``, enlargements those of
``F.interpolate(size=...)``, on the whole image: both are separable, so a band needs the source rows under it only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Pair
from ..io.images import normalise
from ..io.opening import Raster
from .bands import Rows
from .slide import check_scales, enlarged_size


@dataclass(frozen=True)
class NormalisedRows:
    """A raster as float32 rows on a device: scaled to [0, 1], minus mean, divided by std."""

    raster: Raster
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device

    @property
    def height(self) -> int:
        return self.raster.height

    @property
    def width(self) -> int:
        return self.raster.width

    def read(self, top: int, bottom: int) -> Tensor:
        return normalise(self.raster.read(top, bottom), self.mean, self.std, self.device)


@dataclass(frozen=True)
class MirroredRows:
    """Rows from right to left."""

    rows: Rows

    @property
    def height(self) -> int:
        return self.rows.height

    @property
    def width(self) -> int:
        return self.rows.width

    def read(self, top: int, bottom: int) -> Tensor:
        return self.rows.read(top, bottom).flip(3)


class ResizedRows:
    """Rows resized bilinearly by a factor, or to a size (height, width)."""

    def __init__(self, rows: Rows, to: float | Pair, device: torch.device) -> None:
        self._rows, self._to = rows, to
        # Where PyTorch puts its sampling points depends on its rounding in float32, so it is asked: columns that tell
        # the source rows apart by their remainder of 3 come out as the weights of those rows.
        marks = F.one_hot(torch.arange(rows.height, device=device) % 3, 3).T.float()[None, :, :, None]
        weights = self._resized(marks, vertically=True)[0, :, :, 0].cpu()
        self.height = weights.shape[1]
        ratio = 1 / to if isinstance(to, float) else rows.height / to[0]
        centre = ((torch.arange(self.height, dtype=torch.float64) + 0.5) * ratio - 0.5).clamp(0, rows.height - 1)
        near = centre.floor().long() + torch.tensor([-1, 0, 1])[:, None]  # (3, height)
        self._weights = weights.gather(0, near % 3)
        self._sources = near.clamp(0, rows.height - 1)
        self.width = self._resized(torch.empty(1, 1, 1, rows.width), vertically=False).shape[3]

    def read(self, top: int, bottom: int) -> Tensor:
        sources, weights = self._sources[:, top:bottom], self._weights[:, top:bottom]
        used = sources[weights != 0]
        first, last = int(used.min()), int(used.max())
        wide = self._resized(self._rows.read(first, last + 1), vertically=False)
        sources = (sources - first).clamp(0, last - first).to(wide.device)
        weights = weights[:, :, None].to(wide)
        band = wide.index_select(2, sources[0]).mul_(weights[0])
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            band.addcmul_(wide.index_select(2, source), weight)
        return band

    def _resized(self, images: Tensor, vertically: bool) -> Tensor:
        """Along one axis."""
        if isinstance(self._to, float):
            factor = (self._to, 1.0) if vertically else (1.0, self._to)
            return F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)
        size = (self._to[0], images.shape[3]) if vertically else (images.shape[2], self._to[1])
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def scaled_rows(
    rows: Rows, scales: Sequence[float], flip: bool, enlarge_to: int | None, device: torch.device
) -> tuple[list[Rows], list[bool]]:
    """``inference.scaled_and_flipped`` a band at a time: every scale plain and, with ``flip``, mirrored.

    Args:
        enlarge_to: the window that the smaller side of each scale is enlarged to where it is below, None for never.

    Raises:
        ValueError: no scale, or one that is not positive or leaves nothing of the image.
    """
    check_scales(scales, (rows.height, rows.width))
    images: list[Rows] = []
    for scale in scales:
        scaled = rows if scale == 1 else ResizedRows(rows, float(scale), device)
        size = scaled.height, scaled.width
        larger = size if enlarge_to is None else enlarged_size(size, enlarge_to)
        for image in (scaled, MirroredRows(scaled)) if flip else (scaled,):
            images.append(image if larger == size else ResizedRows(image, larger, device))
    return images, [False, True] * len(scales) if flip else [False] * len(scales)
