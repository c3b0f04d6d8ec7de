"""Bands of scaled, mirrored and enlarged images equal those of the whole image, and read no more than they need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.inference.rows import NormalisedRows, ResizedRows, scaled_rows
from segmenter_fast.inference.slide import enlarged_size, scaled_and_flipped
from segmenter_fast.io import Pixels
from segmenter_fast.io.images import normalise

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Counting(Pixels):
    """Remembers which rows were read."""

    largest = 0

    def read(self, top: int, bottom: int) -> np.ndarray:
        assert 0 <= top < bottom <= self.height
        type(self).largest = max(self.largest, bottom - top)
        return super().read(top, bottom)


def whole(pixels: np.ndarray, scales: tuple[float, ...], flip: bool, window: int | None) -> list[Tensor]:
    images, _ = scaled_and_flipped(normalise(pixels, MEAN, STD, CPU), scales, flip)
    if window is None:
        return images
    sizes = [enlarged_size((part.shape[2], part.shape[3]), window) for part in images]
    return [
        part if size == tuple(part.shape[2:]) else F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        for part, size in zip(images, sizes, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), height=st.integers(1, 150), width=st.integers(1, 60), flip=st.booleans())
def test_bands_are_those_of_the_whole_image(data: st.DataObject, height: int, width: int, flip: bool) -> None:
    smallest = 1 / min(height, width)
    usual = [scale for scale in (1.0, 2.0, 1.5, 0.75) if scale >= smallest]
    scale = data.draw(st.one_of(st.sampled_from(usual), st.floats(smallest, 3)))
    window = data.draw(st.sampled_from([None, 16, 40]))
    pixels = image(height, width)
    rows, flips = scaled_rows(NormalisedRows(Pixels(pixels), MEAN, STD, CPU), (1.0, scale), flip, window, CPU)
    assert flips == ([False, True] * 2 if flip else [False] * 2)
    for part, expected in zip(rows, whole(pixels, (1.0, scale), flip, window), strict=True):
        assert (part.height, part.width) == tuple(expected.shape[2:])
        top = data.draw(st.integers(0, part.height - 1))
        bottom = data.draw(st.integers(top + 1, part.height))
        band = part.read(top, bottom)
        torch.testing.assert_close(band, expected[:, :, top:bottom], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.37, 1.75, 0.5])
def test_far_down_a_tall_image_the_sampling_points_are_still_pytorch_s(scale: float) -> None:
    pixels = image(30_011, 5)
    (rows,), _ = scaled_rows(NormalisedRows(Pixels(pixels), MEAN, STD, CPU), (scale,), False, None, CPU)
    (expected,) = whole(pixels, (scale,), False, None)
    for top in range(0, rows.height, 1009):
        band = rows.read(top, min(top + 50, rows.height))
        torch.testing.assert_close(band, expected[:, :, top : top + 50], rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", [0.5, 2.0, (300, 40)])
def test_no_more_rows_are_read_than_a_band_needs(to: float | tuple[int, int]) -> None:
    source = Counting(image(200, 20))
    Counting.largest = 0
    rows = ResizedRows(NormalisedRows(source, MEAN, STD, CPU), to, CPU)
    for top in range(0, rows.height, 10):
        rows.read(top, min(top + 10, rows.height))
    assert Counting.largest <= 10 * 200 / rows.height + 2


@pytest.mark.parametrize("scales", [(), (0.0,), (-1.0,), (float("inf"),), (float("nan"),), (0.01,)])
def test_bad_scales_are_named(scales: tuple[float, ...]) -> None:
    rows = NormalisedRows(Pixels(image(20, 20)), MEAN, STD, CPU)
    with pytest.raises(ValueError, match="scales must"):
        scaled_rows(rows, scales, False, None, CPU)
