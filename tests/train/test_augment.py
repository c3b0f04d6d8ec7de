"""Augmentation against naive formulations: geometry by marked pixels, colours through HSV, crops by counting."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.train import augment
from segmenter_fast.train.augment import TrainTransform, photometric, random_crop, resize_labels, resized, saturate

SIDES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "photometric": False}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, seed: int = 0, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Labels in patches with some ignored pixels, and an image whose red is the label, its green smooth."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, classes, (-(-height // 4), -(-width // 4)), np.uint8)
    labels = coarse.repeat(4, 0).repeat(4, 1)[:height, :width].copy()
    labels[random.random(labels.shape) < 0.05] = 255
    green = np.linspace(0, 255, width)[None].repeat(height, 0).astype(np.uint8)
    return np.stack([labels, green, np.full_like(labels, 7)], 2), labels


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(1, 60), st.integers(1, 40), SEEDS, st.booleans())
def test_any_size_becomes_the_crop(height: int, width: int, resize: int, crop: int, seed: int, flip: bool) -> None:
    image, labels = picture(height, width, seed)
    transform = TrainTransform(resize=resize, crop=crop, flip=flip, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    colors, target = transform(image, labels, generator(seed))
    assert (colors.shape, colors.dtype) == ((3, crop, crop), torch.float32)
    assert (target.shape, target.dtype) == ((crop, crop), torch.int64)
    assert colors.isfinite().all()
    assert set(target.unique().tolist()) <= {*np.unique(labels).tolist(), 255}
    again = transform(image, labels, generator(seed))
    assert torch.equal(colors, again[0])
    assert torch.equal(target, again[1])


@pytest.mark.parametrize("seed", range(8))
def test_image_and_labels_move_together(seed: int) -> None:
    """At the image's own size red stays the label of its pixel, wherever the crop lies and if it is mirrored."""
    image, labels = picture(30, 45, seed)
    transform = TrainTransform(resize=30, crop=20, ratios=(1, 1), **PLAIN)
    colors, target = transform(image, labels, generator(seed))
    assert torch.equal((colors[0] * 255).round().long(), target)
    green = colors[1].diff(dim=1).mean().item()
    whole = TrainTransform(resize=30, crop=20, ratios=(1, 1), flip=False, **PLAIN)
    assert whole(image, labels, generator(seed))[0][1].diff(dim=1).mean() > 0
    assert abs(green) > 1e-3


def test_half_of_the_images_are_mirrored_and_the_ratio_is_uniform() -> None:
    image, labels = picture(40, 40)
    transform = TrainTransform(resize=40, crop=80, ratios=(0.5, 2.0), **PLAIN)
    outputs = [transform(image, labels, generator(seed)) for seed in range(400)]
    mirrored = sum(bool(colors[1, 0, 0] > colors[1, 0, 5]) for colors, _ in outputs)
    assert 160 < mirrored < 240
    sides = np.array([int((colors[2] > 0).any(0).sum()) for colors, _ in outputs])  # blue is 7 within the image
    assert sides.min() < 23
    assert sides.max() > 77
    assert 46 < sides.mean() < 54


def test_a_small_image_is_padded_with_the_mean_and_with_ignored_labels() -> None:
    image, labels = picture(20, 10)
    transform = TrainTransform(
        resize=10, crop=24, ratios=(1, 1), flip=False, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), photometric=False
    )
    colors, target = transform(image, labels, generator(0))
    expected = (image / 255 - np.array([0.1, 0.2, 0.3])) / 0.5
    np.testing.assert_allclose(colors[:, :20, :10].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert np.array_equal(target[:20, :10].numpy(), labels)
    assert (colors[:, 20:] == 0).all()
    assert (colors[:, :, 10:] == 0).all()
    assert (target[20:] == 255).all()
    assert (target[:, 10:] == 255).all()


@settings(max_examples=50, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, SEEDS)
def test_labels_are_resized_to_the_nearest(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    labels = torch.randint(1000, (height, width), generator=generator(seed), dtype=torch.int32)
    naive = [[labels[y * height // rows, x * width // columns].item() for x in range(columns)] for y in range(rows)]
    assert resize_labels(labels, (rows, columns)).tolist() == naive


def test_images_are_resized_bilinearly() -> None:
    image, labels = picture(24, 36)
    transform = TrainTransform(resize=17, crop=40, ratios=(1, 1), flip=False, **PLAIN)
    colors, _ = transform(image, labels, generator(0))
    height, width = resized((24, 36), 17)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = F.interpolate(floats, (height, width), mode="bilinear", align_corners=False)[0]
    assert (colors[:, :height, :width] * 255 - expected).abs().max() <= 1.01  # 8-bit fixed point, rounded


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((512, 683), 512, (512, 683)), ((100, 50), 25, (50, 25)), ((3, 1000), 1, (1, 333)), ((5, 7), 3, (3, 4))],
)
def test_the_smaller_side_rules(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert resized(size, side) == expected


def shares(labels: Tensor, crop: int, place: tuple[int, int]) -> list[float]:
    """Count the share of each class among the labelled pixels of a crop."""
    top, left = place
    inside = [value for row in labels[top : top + crop] for value in row[left : left + crop].tolist() if value != 255]
    return [inside.count(value) / len(inside) for value in set(inside)]


@pytest.mark.parametrize("seed", range(20))
def test_the_first_crop_that_no_class_fills_is_taken(seed: int) -> None:
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[:, 40:] = torch.randint(1, 4, (40, 20), generator=generator(seed), dtype=torch.uint8)
    labels[::7] = 255
    crop, randoms = 16, generator(seed)
    place = random_crop(labels, crop, 0.75, 255, randoms)

    draws = generator(seed)
    for drawn in range(augment.CROPS + 1):
        expected = tuple(int(torch.randint(side - crop + 1, (), generator=draws)) for side in labels.shape)
        if max(shares(labels, crop, expected)) < 0.75 or drawn == augment.CROPS:
            break
    assert place == expected
    assert torch.equal(randoms.get_state(), draws.get_state())


@pytest.mark.parametrize("filling", [0, 3, 255])
def test_an_image_of_one_class_is_cropped_all_the_same(filling: int) -> None:
    labels = torch.full((20, 30), filling, dtype=torch.int32)
    top, left = random_crop(labels, 8, 0.75, 255, generator(0))
    assert 0 <= top <= 12
    assert 0 <= left <= 22


def test_all_places_can_be_drawn_and_the_share_can_be_left_out() -> None:
    labels = torch.zeros(5, 6, dtype=torch.uint8)
    randoms = generator(0)
    places = {random_crop(labels, 4, 1.0, 255, randoms) for _ in range(200)}
    assert places == {(top, left) for top in range(2) for left in range(3)}


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(0.5, 1.5))
def test_saturation_is_that_of_hsv(color: tuple[int, int, int], factor: float) -> None:
    colors = torch.tensor(color, dtype=torch.float32).div(255).view(3, 1, 1)
    hue, saturation, value = colorsys.rgb_to_hsv(*colors.flatten().tolist())
    expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
    np.testing.assert_allclose(saturate(colors, factor).flatten().numpy(), expected, atol=2e-6)


def naive_photometric(color: tuple[float, ...], randoms: torch.Generator) -> tuple[float, ...]:
    """Distort one pixel step by step, as mmsegmentation documents it."""

    def coin() -> bool:
        return int(torch.randint(2, (), generator=randoms)) == 1

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=randoms, dtype=torch.float64).item()

    def clip(values: Any) -> tuple[float, ...]:
        return tuple(min(max(value, 0.0), 1.0) for value in values)

    def contrast(color: tuple[float, ...]) -> tuple[float, ...]:
        factor = uniform(0.5, 1.5) if coin() else 1.0
        return clip(channel * factor for channel in color)

    if coin():
        delta = uniform(-32, 32) / 255
        color = clip(channel + delta for channel in color)
    if mode := coin():
        color = contrast(color)
    if coin():
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        color = colorsys.hsv_to_rgb(hue, min(saturation * uniform(0.5, 1.5), 1.0), value)
    if coin():
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        color = colorsys.hsv_to_rgb((hue + uniform(-18, 18) / 180) % 1, saturation, value)
    return color if mode else contrast(color)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3), SEEDS)
def test_photometric_distortion_against_one_pixel_at_a_time(color: tuple[int, int, int], seed: int) -> None:
    colors = torch.tensor(color, dtype=torch.float32).div(255)
    ours, theirs = generator(seed), generator(seed)
    expected = naive_photometric(tuple(colors.tolist()), theirs)
    np.testing.assert_allclose(photometric(colors.view(3, 1, 1), ours).flatten().numpy(), expected, atol=1e-5)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_photometric_distortion_leaves_its_input_alone() -> None:
    colors = torch.rand(3, 4, 5)
    before = colors.clone()
    assert any(not torch.equal(photometric(colors, generator(seed)), before) for seed in range(4))
    assert torch.equal(colors, before)
