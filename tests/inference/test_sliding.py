"""Sliding windows, scales and flips: the official program's outputs, a naive composition, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.inference import slide
from segmenter_fast.reference import ReferenceSegmenter
from support.canvas import canvas_logits, scaled_and_flipped

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = ("official_mask", "official_deit_linear")
Logits = Callable[[Tensor], Tensor]


def toy(classes: int = 3) -> Logits:
    """A fast model whose logits depend on the place in the window and on neighbours, as a real model's do."""
    weight = torch.randn(classes, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def logits(images: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, images.shape[3], dtype=images.dtype)
        return F.conv2d(images, weight.to(images), padding=1) * (1 + ramp)

    return logits


def naive(model: Logits, image: Tensor, scales: list[float], flip: bool, window: int, stride: int) -> Tensor:
    """The official composition in float64: ``(K, H, W)`` probabilities."""
    images, flips = scaled_and_flipped(image, scales, flip, enlarge_to=window)
    return canvas_logits(model, images, flips, tuple(image.shape[2:]), window, stride).softmax(1).mean(0)


@pytest.mark.parametrize("kind", ["model", "reference"])
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_of_the_official_program(name: str, kind: str) -> None:
    loaded = sf.load(GOLDEN / name)
    model: torch.nn.Module = loaded
    if kind == "reference":
        model = ReferenceSegmenter(loaded.config).eval()
        model.load_state_dict(loaded.state_dict(), strict=True)
    config = loaded.config
    cases = load_file(GOLDEN / name / "cases.safetensors")
    keys = [key.removesuffix("/image") for key in cases if key.startswith("slide/") and key.endswith("/image")]
    assert len(keys) == 2
    for key in keys:
        expected, ratios = cases[f"{key}/probabilities"], cases.get(f"{key}/ratios")
        scales = [1.0] if ratios is None else ratios.tolist()
        images, flips = scaled_and_flipped(cases[f"{key}/image"], scales, flip=ratios is not None)
        arguments = (images, flips, tuple(expected.shape[1:]), config.window_size, config.window_stride, 3)
        torch.testing.assert_close(slide(model, *arguments, "probabilities"), expected, rtol=0, atol=1e-5)
        top = expected.topk(2, dim=0).values
        decided = top[0] - top[1] > 2e-5
        assert torch.equal(slide(model, *arguments)[decided], expected.argmax(0).to(torch.uint8)[decided])


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    window=st.integers(1, 16),
    stride=st.integers(2, 16),
    batch_size=st.integers(1, 7),
    scales=st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.3, 2.0]), min_size=1, max_size=3),
    flip=st.booleans(),
)
def test_any_size_equals_the_naive_composition(
    height: int, width: int, window: int, stride: int, batch_size: int, scales: list[float], flip: bool
) -> None:
    scales = [scale if min(height, width) * scale >= 1 else 1.0 for scale in scales]
    stride, window = min(stride, window + 2), window + 2  # tiny windows would be too many
    image = torch.randn(1, 3, height, width, dtype=torch.float64)
    images, flips = scaled_and_flipped(image, scales, flip)
    expected = naive(toy(), image, scales, flip, window, stride)
    arguments = (toy(), images, flips, (height, width), window, stride, batch_size)
    torch.testing.assert_close(slide(*arguments, output="probabilities"), expected, rtol=0, atol=1e-10)
    labels = slide(*arguments)
    assert labels.shape == (height, width)
    chosen = expected.gather(0, labels[None].long())[0]
    assert (expected.max(0).values - chosen).max() <= 1e-10


def test_every_pixel_and_every_window_is_seen_in_batches() -> None:
    seen: list[int] = []

    def count(images: Tensor) -> Tensor:
        seen.append(len(images))
        assert images.shape[2:] == (16, 16)
        return images[:, :1]

    image = torch.randn(1, 3, 40, 33)
    probabilities = slide(count, [image], [False], (40, 33), 16, 10, 4, "probabilities")
    assert seen == [4, 4, 4]  # 4 rows of 3 windows
    assert torch.equal(probabilities, torch.ones(1, 40, 33))


def test_images_below_the_window_stay_as_they_are_where_the_configuration_says_so() -> None:
    model = sf.create_model(
        "seg_t_linear_16", image_size=64, depth=1, upscale_small_images=False, upsample_to="image"
    ).eval()
    image = torch.randn(1, 3, 40, 100)
    labels = slide(model, [image], [False], (40, 100), 64, 64)
    parts = [model(image[..., left : left + 64])[0] for left in (0, 36)]
    canvas = torch.zeros(150, 40, 100)
    canvas[..., :64] += parts[0]
    canvas[..., 36:] += parts[1]
    canvas[..., 36:64] /= 2
    assert torch.equal(labels, canvas.argmax(0).to(torch.uint8))


def test_a_window_larger_than_the_image_enlarges_it() -> None:
    image = torch.randn(1, 3, 10, 15)
    enlarged = F.interpolate(image, (32, 48), mode="bilinear")
    direct = slide(toy(), [enlarged], [False], (10, 15), 32, 32, output="probabilities")
    assert torch.equal(slide(toy(), [image], [False], (10, 15), 32, 32, output="probabilities"), direct)


def test_bfloat16_logits_are_averaged_in_float32() -> None:
    image = torch.randn(1, 3, 20, 50).bfloat16()
    model = toy()
    low = slide(model, [image], [False], (20, 50), 20, 3, output="probabilities")
    assert low.dtype == torch.float32
    # the same bfloat16 logits, averaged in float64: only the canvas differs
    high = slide(lambda crops: model(crops).double(), [image], [False], (20, 50), 20, 3, output="probabilities")
    torch.testing.assert_close(low, high.float(), rtol=0, atol=1e-6)


def test_more_than_256_classes_give_int32_labels() -> None:
    labels = slide(toy(300), [torch.randn(1, 3, 9, 9)], [False], (9, 9), 8, 4)
    assert labels.dtype == torch.int32
    assert labels.max() > 255


def test_a_mirrored_image_alone_is_turned_back() -> None:
    image = torch.randn(1, 3, 20, 20)

    def unmirrored(crops: Tensor) -> Tensor:  # undoes the mirroring, so that only the composition is left
        return toy()(crops.flip(3)).flip(3)

    plain = slide(toy(), [image], [False], (20, 20), 20, 20)
    assert torch.equal(slide(unmirrored, [image.flip(3)], [True], (20, 20), 20, 20), plain)
    assert not torch.equal(slide(unmirrored, [image.flip(3)], [False], (20, 20), 20, 20), plain)


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": []}, ValueError, "images must hold at least one"),
        ({"images": [IMAGE, IMAGE]}, ValueError, "flips must have one entry for each of the 2 images, got 1"),
        ({"images": [torch.zeros(1, 4, 8, 8)]}, ValueError, r"images\[0\] must be \(1, 3, h, w\), got \(1, 4, 8, 8\)"),
        ({"images": [torch.zeros(0, 3, 8, 8)]}, ValueError, r"images\[0\] must be \(1, 3, h, w\), got \(0, 3, 8, 8\)"),
        ({"images": [torch.zeros(1, 3, 0, 8)]}, ValueError, r"images\[0\] must be \(1, 3, h, w\), got \(1, 3, 0, 8\)"),
        ({"images": [IMAGE.byte()]}, TypeError, r"images\[0\] must be floating point and normalised, got torch.uint8"),
        ({"images": [IMAGE * torch.nan]}, ValueError, r"images\[0\] must be finite"),
        ({"images": [IMAGE + torch.inf]}, ValueError, r"images\[0\] must be finite"),
        ({"size": (0, 8)}, ValueError, "size must be"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"window": 4, "stride": 5}, ValueError, "stride must be at most the window, 4"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"output": "logits"}, ValueError, "output must be one of labels, probabilities, got 'logits'"),
        ({"model": lambda images: images[..., :-1]}, ValueError, "model must give logits"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"model": toy(), "images": [IMAGE], "flips": [False], "size": (8, 8), "window": 8, "stride": 8}
    with pytest.raises(error, match=message):
        slide(**{**arguments, **change})


def test_an_image_smaller_than_a_patch() -> None:
    model = sf.create_model("seg_t_mask_16", image_size=32, depth=1, num_classes=4).eval()
    image = torch.randn(1, 3, 3, 5)
    labels = slide(model, [image], [False], (3, 5), 32, 32)
    enlarged = F.interpolate(image, (32, 53), mode="bilinear")
    canvas = torch.zeros(4, 32, 53)
    with torch.inference_mode():
        canvas[..., :32] += model(enlarged[..., :32])[0]
        canvas[..., 21:] += model(enlarged[..., 21:])[0]
    canvas[..., 21:32] /= 2
    assert torch.equal(labels, F.interpolate(canvas[None], (3, 5), mode="bilinear")[0].argmax(0).to(torch.uint8))
