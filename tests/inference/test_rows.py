"""Bands of scaled, mirrored and enlarged images equal those of the whole image, and read no more than they need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.inference.rows import Rows, image_views
from segmenter_fast.io import Pixels
from segmenter_fast.io.images import normalise

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Counting(Pixels):
    """Remembers which rows were read."""

    largest = 0

    def read(self, top: int, bottom: int) -> np.ndarray:
        assert 0 <= top < bottom <= self.height
        type(self).largest = max(self.largest, bottom - top)
        return super().read(top, bottom)


def whole(pixels: np.ndarray, scales: tuple[float, ...], flip: bool, window: int | None) -> list[Tensor]:
    """The same views of the image in memory."""
    views = []
    for scale in scales:
        scaled = normalise(pixels, MEAN, STD, CPU)
        if scale != 1:
            scaled = F.interpolate(scaled, scale_factor=scale, mode="bilinear", align_corners=False)
        views += [scaled, scaled.flip(3)] if flip else [scaled]
    if window is None:
        return views
    sizes = [enlarged_size(*part.shape[2:], window) for part in views]
    return [
        part if size == tuple(part.shape[2:]) else F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        for part, size in zip(views, sizes, strict=True)
    ]


def enlarged_size(height: int, width: int, window: int) -> tuple[int, int]:
    if min(height, width) >= window:
        return height, width
    return (window, int(width / height * window)) if height < width else (int(height / width * window), window)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), height=st.integers(1, 150), width=st.integers(1, 60), flip=st.booleans(), lazy=st.booleans())
def test_bands_are_those_of_the_whole_image(
    data: st.DataObject, height: int, width: int, flip: bool, lazy: bool
) -> None:
    smallest = 1 / min(height, width)
    usual = [scale for scale in (1.0, 2.0, 1.5, 0.75) if scale >= smallest]
    scale = data.draw(st.one_of(st.sampled_from(usual), st.floats(smallest, 3)))
    window = data.draw(st.sampled_from([None, 16, 40]))
    pixels = noise(height, width)
    image = (
        Rows.of_raster(Pixels(pixels), MEAN, STD, CPU) if lazy else Rows.of_tensor(normalise(pixels, MEAN, STD, CPU))
    )
    rows, flips = image_views(image, (1.0, scale), flip, window)
    assert flips == ([False, True] * 2 if flip else [False] * 2)
    for part, expected in zip(rows, whole(pixels, (1.0, scale), flip, window), strict=True):
        assert (part.height, part.width) == tuple(expected.shape[2:])
        top = data.draw(st.integers(0, part.height - 1))
        bottom = data.draw(st.integers(top + 1, part.height))
        band = part.read(top, bottom)
        torch.testing.assert_close(band, expected[:, :, top:bottom], rtol=0, atol=1e-6 if lazy else 0)


@pytest.mark.parametrize("scale", [0.37, 1.75, 0.5])
def test_far_down_a_tall_image_the_sampling_points_are_still_pytorch_s(scale: float) -> None:
    pixels = noise(30_011, 5)
    (rows,), _ = image_views(Rows.of_raster(Pixels(pixels), MEAN, STD, CPU), (scale,))
    (expected,) = whole(pixels, (scale,), False, None)
    for top in range(0, rows.height, 1009):
        band = rows.read(top, min(top + 50, rows.height))
        torch.testing.assert_close(band, expected[:, :, top : top + 50], rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", [0.5, 2.0, (300, 40)])
def test_no_more_rows_are_read_than_a_band_needs(to: float | tuple[int, int]) -> None:
    source = Counting(noise(200, 20))
    Counting.largest = 0
    rows = Rows.of_raster(source, MEAN, STD, CPU).resized(to)
    for top in range(0, rows.height, 10):
        rows.read(top, min(top + 10, rows.height))
    assert Counting.largest <= 10 * 200 / rows.height + 2


def test_a_scale_that_leaves_no_pixel_is_named() -> None:
    with pytest.raises(ValueError, match=r"leave at least one pixel, got 0\.01 for an image of 20 x 30 pixels"):
        image_views(Rows.of_raster(Pixels(noise(20, 30)), MEAN, STD, CPU), (1.0, 0.01))


@pytest.mark.parametrize(
    ("size", "window", "expected"),
    [
        ((100, 200), 64, (100, 200)),
        ((64, 64), 64, (64, 64)),
        ((30, 100), 64, (64, 213)),
        ((100, 30), 64, (213, 64)),
        ((1, 1), 512, (512, 512)),
        ((54, 72), 64, (64, 85)),
    ],
)
def test_enlarged_size(size: tuple[int, int], window: int, expected: tuple[int, int]) -> None:
    enlarged = Rows.of_raster(Pixels(noise(*size)), MEAN, STD, CPU).enlarged(window)
    assert (enlarged.height, enlarged.width) == expected
