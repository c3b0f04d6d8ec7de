"""From one image, of any kind and size, to its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import visualize
from ..config import SegmenterConfig
from ..io import Raster, open_raster
from ..io.images import ImageSource
from ..segmenter import Segmenter
from ..visualize import Color
from .bands import Progress, slide_rows
from .rows import NormalisedRows, scaled_rows
from .settings import Settings, enlarges_small_images, fits_one_window
from .slide import check_scales


@dataclass(frozen=True, eq=False)
class Prediction:
    """The labels of one image, at the image's own size."""

    labels: np.ndarray
    """``(H, W)`` class indices, uint8 up to 256 classes and int32 above."""
    raster: Raster
    """The pixels that were segmented, by bands of rows; see ``image``."""
    class_names: tuple[str, ...]
    """One name per class; "class 0", "class 1", ... where the model has none."""
    palette: tuple[Color, ...]
    """RGB per class, the model's own or ``visualize.default_palette``."""

    @property
    def image(self) -> np.ndarray:
        """``(H, W, 3)`` uint8: the RGB pixels that were segmented, upright; of a large file read again."""
        return self.raster.read(0, self.raster.height)

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image under the labels' colours; ``alpha`` 0 shows the image only, 1 the colours only."""
        return visualize.overlay(self.image, self.labels, self.palette, alpha)

    def label_image(self) -> Image.Image:
        """An image whose pixel values are the class indices: mode P up to 256 classes, 16-bit grey above."""
        return visualize.label_image(self.labels, self.palette)

    def share_by_class(self) -> dict[str, float]:
        """Share of the pixels, in (0, 1], of each class that occurs, largest first; classes of one name add up."""
        shares: dict[str, float] = {}
        counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
        for index in np.argsort(-counts, kind="stable"):
            if counts[index]:
                name = self.class_names[index]
                shares[name] = shares.get(name, 0.0) + int(counts[index]) / self.labels.size
        return shares


def predict(
    model: Segmenter,
    image: ImageSource,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 2,
) -> Prediction:
    """Segments one image on the model's device, in the dtype of its weights, in evaluation mode.

    Where a single window covers the image as it is, the labels come from ``model.segment``; otherwise from
    ``sliding.slide_rows``. Neither builds logits of the image's size. A large file is read by rows, so that labels
    are all that has its size; see ``rasters.open_raster``.

    Args:
        model: a model with its configuration.
        image: a path, a PIL image, or a uint8 array ``(H, W, 3)`` or ``(H, W)``; see ``images.read_image``.
        scales: factors that the image is resized by; their probabilities are averaged.
        flip: whether every scale is segmented mirrored, too.
        window: side of the windows in pixels, by default the configuration's.
        stride: pixels between windows, by default the configuration's, and never more than the window.
        batch_size: windows that go through the model at once.

    Raises:
        TypeError, ValueError: an image or an option that cannot be used, naming it.
        OSError: an image file that does not exist or cannot be decoded.
    """
    settings = Settings.of(model.config, window, stride, scales, flip, batch_size)
    return predict_raster(model, open_raster(image), settings)


def predict_raster(
    model: Segmenter, raster: Raster, settings: Settings, progress: Progress | None = None
) -> Prediction:
    """``predict`` for an image that is open; ``progress`` as in ``sliding.slide_rows``."""
    labels: np.ndarray | None = None
    for top, band in label_bands(model, raster, settings, progress=progress):
        if labels is None:
            labels = np.empty((raster.height, raster.width), band.dtype)
        labels[top : top + len(band)] = band
    assert labels is not None
    names, palette = classes(model.config)
    return Prediction(labels, raster, names, palette)


@torch.inference_mode()
def label_bands(
    model: Segmenter, raster: Raster, settings: Settings, start: int = 0, progress: Progress | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(top, labels ``(h, W)``) of the rows of an image from ``start`` on, downwards; see ``predict``.

    The model is in evaluation mode from the first band to the last.
    """
    config, size = model.config, (raster.height, raster.width)
    check_scales(settings.scales, size)
    device = next(model.parameters()).device
    rows = NormalisedRows(raster, config.mean, config.std, device)
    plain = settings.scales == (1.0,) and not settings.flip
    with _evaluating(model):
        if plain and fits_one_window(model, size, settings.window):
            yield start, _to_array(model.segment(rows.read(0, size[0]))[0, start:], config.num_classes)
            return
        enlarge_to = settings.window if enlarges_small_images(model) else None
        images, flips = scaled_rows(rows, settings.scales, settings.flip, enlarge_to, device)
        options = settings.window, settings.stride, settings.batch_size
        for top, labels in slide_rows(model, images, flips, size, *options, start=start, progress=progress):
            yield top, _to_array(labels, config.num_classes)


def classes(config: SegmenterConfig) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """A name and a colour for each class: the model's own, or made ones."""
    names = config.class_names or tuple(f"class {index}" for index in range(config.num_classes))
    return names, config.palette or visualize.default_palette(config.num_classes)


def _to_array(labels: Tensor, num_classes: int) -> np.ndarray:
    return labels.to("cpu", torch.uint8 if num_classes <= 256 else torch.int32).numpy()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with no dropout or stochastic depth; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
