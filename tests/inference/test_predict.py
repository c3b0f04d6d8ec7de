"""One image in, labels at its own size out, by the fast path or by windows."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference import slide
from segmenter_fast.inference.predict import Prediction
from segmenter_fast.io import Pixels
from segmenter_fast.io.images import normalise
from segmenter_fast.reference import ReferenceSegmenter
from segmenter_fast.visualize import default_palette
from support.canvas import scaled_and_flipped
from support.models import pixels, windowed


def by_windows(model: sf.Segmenter, image: np.ndarray, scales: tuple[float, ...] = (1.0,), flip: bool = False):
    tensor = normalise(image, model.config.mean, model.config.std, torch.device("cpu"))
    images, flips = scaled_and_flipped(tensor, scales, flip)
    return slide(model, images, flips, image.shape[:2], 32, 24).numpy()


def test_an_image_of_the_windows_size_goes_through_segment_and_not_through_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, image = windowed(), pixels(32, 32)
    expected = by_windows(model, image)
    assert len(np.unique(expected)) > 1
    monkeypatch.setattr(model, "forward", lambda images: pytest.fail("the logits were built"))
    result = sf.predict(model, image)
    assert np.array_equal(result.labels, expected)
    assert result.labels.dtype == np.uint8


@pytest.mark.parametrize("size", [(20, 20), (32, 33), (50, 90), (1, 1), (5, 40)])
def test_other_sizes_go_through_windows(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = windowed(), pixels(*size)
    monkeypatch.setattr(model, "segment", lambda images: pytest.fail("the window does not cover the image as it is"))
    result = sf.predict(model, image)
    assert result.labels.shape == size
    assert np.array_equal(result.labels, by_windows(model, image))


def test_models_that_keep_small_images_segment_them_directly() -> None:
    model = windowed(upscale_small_images=False)
    image = pixels(7, 29)
    whole = normalise(image, model.config.mean, model.config.std, torch.device("cpu"))
    assert np.array_equal(sf.predict(model, image).labels, model.segment(whole)[0].numpy())


def test_scales_and_flip() -> None:
    model, image = windowed(), pixels(40, 50)
    result = sf.predict(model, image, scales=(0.75, 1.0, 1.5), flip=True)
    assert np.array_equal(result.labels, by_windows(model, image, (0.75, 1.0, 1.5), True))
    square = pixels(32, 32)
    assert np.array_equal(sf.predict(model, square, flip=True).labels, by_windows(model, square, flip=True))


def test_window_and_stride_may_be_given() -> None:
    model, image = windowed(), pixels(64, 64)
    whole = normalise(image, model.config.mean, model.config.std, torch.device("cpu"))
    assert np.array_equal(sf.predict(model, image, window=64).labels, model.segment(whole)[0].numpy())
    expected = slide(model, [whole], [False], (64, 64), 48, 10).numpy()
    assert np.array_equal(sf.predict(model, image, window=48, stride=10).labels, expected)
    expected = slide(model, [whole], [False], (64, 64), 16, 16).numpy()  # the stride never exceeds the window
    assert np.array_equal(sf.predict(model, image, window=16).labels, expected)


def test_paths_pil_images_and_arrays_give_the_same(tmp_path: Path) -> None:
    model, image = windowed(), pixels(40, 33)
    Image.fromarray(image).save(tmp_path / "x.png")
    expected = sf.predict(model, image).labels
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(image)):
        assert np.array_equal(sf.predict(model, source).labels, expected)


def test_the_oracle_predicts_the_same() -> None:
    model = windowed()
    reference = ReferenceSegmenter(model.config).eval()
    reference.load_state_dict(model.state_dict())
    for size in ((32, 32), (40, 61)):
        ours, theirs = (sf.predict(which, pixels(*size)).labels for which in (model, reference))
        assert ours.dtype == theirs.dtype == np.uint8
        assert (ours == theirs).mean() > 0.999


def test_a_model_in_training_predicts_in_evaluation_mode_and_stays_in_training() -> None:
    model = windowed(decoder_dropout=0.5, drop_path_rate=0.5)
    expected = sf.predict(model, pixels(32, 32)).labels
    model.train()
    model.encoder.norm.eval()
    assert np.array_equal(sf.predict(model, pixels(32, 32)).labels, expected)
    assert model.training
    assert model.decoder.training
    assert not model.encoder.norm.training


@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_bfloat16_on_the_cpu(size: tuple[int, int]) -> None:
    model, image = windowed(), pixels(*size)
    exact = sf.predict(model, image).labels
    labels = sf.predict(model.bfloat16(), image).labels
    assert labels.shape == size
    assert (labels == exact).mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_a_gpu_gives_the_labels_of_the_cpu(size: tuple[int, int], dtype: torch.dtype) -> None:
    model, image = windowed(), pixels(*size)
    expected = sf.predict(model, image, scales=(1.0,)).labels
    averaged = sf.predict(model, image, scales=(1.0, 1.5), flip=True).labels
    model = model.to("cuda", dtype)
    share = 0.98 if dtype == torch.float32 else 0.8  # TF32 and half precision change close calls of random weights
    assert (sf.predict(model, image).labels == expected).mean() > share
    assert (sf.predict(model, image, scales=(1.0, 1.5), flip=True).labels == averaged).mean() > share


def test_more_than_256_classes() -> None:
    model = windowed(num_classes=300)
    result = sf.predict(model, pixels(32, 32))
    assert result.labels.dtype == np.int32
    assert result.label_image().mode == "I;16"


def test_names_and_palette_come_from_the_model_or_are_made() -> None:
    made = sf.predict(windowed(), pixels(32, 32))
    assert made.class_names == ("class 0", "class 1", "class 2", "class 3", "class 4")
    assert made.palette == default_palette(5)
    names, palette = ("a", "b", "c", "d", "e"), tuple((index, 0, 255) for index in range(5))
    own = sf.predict(windowed(class_names=names, palette=palette), pixels(32, 32))
    assert (own.class_names, own.palette) == (names, palette)


def test_a_prediction_shows_itself() -> None:
    labels = np.array([[2, 2, 0, 2]], np.uint8)
    image = np.zeros((1, 4, 3), np.uint8)
    result = Prediction(labels, Pixels(image), ("sky", "tree", "road"), ((10, 0, 0), (0, 10, 0), (0, 0, 10)))
    assert result.share_by_class() == {"road": 0.75, "sky": 0.25}
    assert np.array_equal(np.asarray(result.label_image()), labels)
    assert np.array_equal(np.asarray(result.overlay(1.0))[0], [[0, 0, 10], [0, 0, 10], [10, 0, 0], [0, 0, 10]])
    with pytest.raises(AttributeError):
        result.labels = labels  # type: ignore[misc]


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (pixels(8, 8).astype(np.float32), {}, TypeError, "image must be a uint8 array, got float32"),
        (pixels(8, 8)[..., :2], {}, ValueError, r"image must be \(H, W, 3\)"),
        (pixels(8, 8)[:0], {}, ValueError, "image must have at least one pixel"),
        (torch.full((1, 3, 8, 8), torch.nan), {}, TypeError, "image must be a path.*got Tensor"),
        (pixels(8, 8), {"scales": ()}, ValueError, "scales must name at least one scale"),
        (pixels(8, 8), {"scales": (1.0, 0.1)}, ValueError, "scales must leave at least one pixel, got 0.1"),
        (pixels(8, 8), {"window": 0}, ValueError, "window must be at least 1, got 0"),
        (pixels(32, 32), {"stride": 33}, ValueError, "stride must be at most the window, 32"),
        (pixels(32, 32), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        (pixels(32, 32), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(
    image: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sf.predict(windowed(), image, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["plain", "inference"])
def test_a_list_gives_a_list_in_order(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = windowed(), [pixels(*size) for size in ((32, 32), (40, 33), (32, 32), (20, 20), (32, 32))]
    model = model if form == "plain" else model.optimize(torch.float32, compile=False)  # type: ignore[assignment]
    expected = [sf.predict(model, image) for image in images]
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    batches, real = list[int](), model.segment
    monkeypatch.setattr(model, "segment", lambda batch: (batches.append(len(batch)), real(batch))[1])
    mixed = [paths[0], images[1], Image.fromarray(images[2]), str(paths[3]), images[4]]
    for sources in (paths, images, tuple(mixed)):
        found = sf.predict(model, sources)
        assert isinstance(found, list)
        assert all(np.array_equal(own.labels, wanted.labels) for own, wanted in zip(found, expected, strict=True))
        assert all(np.array_equal(own.image, image) for own, image in zip(found, images, strict=True))
    assert batches == [2, 1] * 3
    assert sf.predict(model, []) == []


def test_a_lazy_image_may_stand_in_a_list_twice(tmp_path: Path) -> None:
    Image.fromarray(pixels(32, 32)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as lazy:
        first, *others = sf.predict(windowed(), [lazy] * 6)
    assert all(np.array_equal(first.labels, other.labels) for other in others)


def test_errors_in_a_list_name_the_image(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    whole = pixels(32, 32)
    with pytest.raises(OSError, match=rf"^images\[1\] \({tmp_path}/x\.png\): image .* cannot be read"):
        sf.predict(windowed(), [whole, tmp_path / "x.png"])
    with pytest.raises(FileNotFoundError, match=r"^images\[0\] \(nowhere\.png\): "):
        sf.predict(windowed(), ["nowhere.png"])
    with pytest.raises(TypeError, match=r"^images\[2\]: image must be a uint8 array, got float64"):
        sf.predict(windowed(), [whole, whole, whole / 255])
    with pytest.raises(ValueError, match=r"^images\[1\]: scales must leave at least one pixel"):
        sf.predict(windowed(), [whole, pixels(4, 4)], scales=(1.0, 0.1))


def test_one_scale_may_be_a_number() -> None:
    model, image = windowed(), pixels(32, 32)
    assert np.array_equal(sf.predict(model, image, scales=1.5).labels, sf.predict(model, image, scales=(1.5,)).labels)
    with pytest.raises(TypeError, match=r"scales must be numbers, such as \(0\.75, 1\.0\), got \('1', '\.', '5'\)"):
        sf.predict(model, image, scales="1.5")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["segment", "forward"])
def test_tensors_that_are_no_images_are_named(path: str) -> None:
    method = getattr(windowed(), path)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        method(torch.zeros(1, 4, 32, 32))
    with pytest.raises(TypeError, match=r"images must be floating point and normalised, got torch\.uint8"):
        method(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_an_empty_batch_and_an_image_below_a_patch_give_results() -> None:
    model = windowed()
    with torch.inference_mode():
        assert model.segment(torch.zeros(0, 3, 32, 32)).shape == (0, 32, 32)
        image = torch.randn(2, 3, 5, 3)
        assert torch.equal(model.segment(image).long(), model(image).argmax(1))


def test_a_prediction_is_one_line_and_a_figure_in_a_notebook() -> None:
    labels = np.repeat(np.array([[0, 1], [2, 1], [3, 1], [3, 1]], np.uint8), 400, 1)  # (4, 800)
    labels[0, 0] = 4
    names = ("wall", "<b>", "sky", "floor", "dot", "none")
    image = np.full((4, 800, 3), 100, np.uint8)
    prediction = Prediction(labels, Pixels(image), names, default_palette(6))
    assert repr(prediction) == "Prediction(800 x 4, 5 classes: <b> 50 %, floor 25 %, sky 12 %, ...)"
    html = prediction._repr_html_()
    assert "800 x 4, 5 classes:" in html
    assert "&lt;b&gt;, 50 %" in html
    assert "<b>" not in html
    assert "dot, &lt;1 %" in html
    assert "none" not in html
    assert f"background:rgb{default_palette(6)[3]}" in html
    with Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]*)', html)[1]))) as picture:
        assert picture.size == (400, 2)
    one = Prediction(labels[:, 400:], Pixels(image[:, 400:]), names, default_palette(6))
    assert repr(one) == "Prediction(400 x 4, 1 class: <b> 100 %)"


def test_a_figure_names_the_largest_of_many_classes() -> None:
    labels = np.arange(30, dtype=np.uint8).repeat(np.arange(30, 0, -1))[None]
    raster = Pixels(np.zeros((*labels.shape, 3), np.uint8))
    names = tuple(f"class {index}" for index in range(30))
    html = Prediction(labels, raster, names, default_palette(30))._repr_html_()
    assert "30 classes, the 24 largest:" in html
    assert "class 23, " in html
    assert "class 24, " not in html
