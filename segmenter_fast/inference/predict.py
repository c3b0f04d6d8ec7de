"""Labels of images of any kind and size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import visualize
from ..captions import captioned, legend_of, percent
from ..config import Pair, SegmenterConfig
from ..io.images import ImageSource, Raster, normalise, open_raster
from ..token_merging import Merge
from ..visualize import Color
from .batches import Model, evaluation_mode, in_batches, read_ahead, segment_images, side_threads
from .rows import Rows, enlarged_size, image_views
from .settings import Settings, check_work, one_window
from .sliding import Progress, slide_rows

_NOTEBOOK_SIDE = 640
"""Longest side in pixels of a prediction's picture in a notebook."""


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The labels of one image, at the image's own size."""

    labels: np.ndarray
    """``(H, W)`` class indices, uint8 up to 256 classes and int32 above."""
    raster: Raster
    """The pixels that were segmented, read by bands of rows; see ``image``."""
    class_names: tuple[str, ...]
    """One name per class; "class 0", "class 1", ... where the model has none."""
    palette: tuple[Color, ...]
    """RGB per class, the model's own or ``visualize.default_palette``."""
    values: tuple[int, ...] = ()
    """Value of each class in label files; empty where it is the class itself."""

    @property
    def image(self) -> np.ndarray:
        """``(H, W, 3)`` uint8: the segmented pixels, upright, see ``displayed``. A large file is read again."""
        return visualize.displayed(self.raster.read(0, self.raster.height))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image under the labels' colours; ``alpha`` 0 shows the image only, 1 the colours only."""
        return visualize.overlay(self.image, self.labels, self.palette, alpha)

    def captioned_overlay(self, note: str = "") -> Image.Image:
        """The overlay above a legend of the classes that occur, with their shares, and a note in red."""
        return captioned([[self.overlay()]], legend=self._legend(), note=note)

    def label_image(self) -> Image.Image:
        """An image whose pixels are ``values``, or class indices: mode P up to 256 classes, 16-bit grey above."""
        labels, palette, _ = visualize.stored_labels(self.labels, self.palette, self.class_names, self.values)
        return visualize.label_image(labels, palette)

    def share_by_class(self) -> dict[str, float]:
        """Share of the pixels, in (0, 1], of each class that occurs, largest first; classes of one name are summed."""
        shares: dict[str, float] = {}
        counts = self._counts()
        for index in np.argsort(-counts, kind="stable"):
            if counts[index]:
                share = int(counts[index]) / self.labels.size
                shares[self.class_names[index]] = shares.get(self.class_names[index], 0.0) + share
        return shares

    def _counts(self) -> np.ndarray:
        """Return the pixels of each class."""
        # A bincount takes 8 bytes a pixel.
        bands = np.array_split(self.labels, max(self.labels.size >> 24, 1))
        return np.sum([np.bincount(band.ravel(), minlength=len(self.class_names)) for band in bands], 0)

    def _legend(self, drawn: bool = True) -> list[tuple[Color | None, str]]:
        return legend_of(self._counts(), self.palette, self.class_names, drawn=drawn)

    def _size(self, classes: int) -> str:
        return f"{self.raster.width} x {self.raster.height}, {classes} class{'es' if classes > 1 else ''}"

    def __repr__(self) -> str:
        """Return one line: width x height, number of classes that occur, and the three largest."""
        shares = [f"{name} {percent(share)}" for name, share in self.share_by_class().items()]
        dots = ", ..." if len(shares) > 3 else ""
        return f"Prediction({self._size(len(shares))}: {', '.join(shares[:3])}{dots})"

    def _repr_html_(self) -> str:
        """Return the form for notebooks: a reduced overlay, and the colours and shares of the largest classes."""
        picture = visualize.reduced_overlay(
            self.raster, lambda top, bottom: self.labels[top:bottom], self.palette, _NOTEBOOK_SIDE
        )
        legend = [(color, text) for color, text in self._legend(drawn=False) if color is not None]
        classes = int((self._counts() > 0).sum())
        title = self._size(classes) + (f", the {len(legend)} largest:" if len(legend) < classes else ":")
        return visualize.html_figure(picture, title, legend)


@overload
def predict(model: Model, image: ImageSource, **options: Any) -> Prediction: ...
@overload
def predict(model: Model, image: list[Any] | tuple[Any, ...], **options: Any) -> list[Prediction]: ...


def predict(  # type: ignore[misc]  # the overloads do not repeat the options
    model: Model,
    image: ImageSource | list[Any] | tuple[Any, ...],
    *,
    scales: Sequence[float] | float = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 2,
    bands: Sequence[int] | None = None,
    scale: float | None = None,
    merge: Merge = None,
) -> Prediction | list[Prediction]:
    """Segment an image, or a list of them, on the model's device, in the dtype of its weights, in evaluation mode.

    Where a single window covers the image as it is, the labels come from ``model.segment``; otherwise from
    ``slide_rows``. Neither builds logits of the image's size. A large file is read by rows, so that the labels are all
    that has its size; see ``io.open_raster``.

    The images of a list that one window covers are segmented in batches of one size, while threads read the next ones.
    All their pixels and labels stay in memory; ``segmenter-fast predict`` takes folders of any length.

    Args:
        model: a Segmenter, or its inference form, which ``Segmenter.optimize`` makes.
        image: a path, a PIL image, or a uint8 array ``(H, W, 3)`` or ``(H, W)``, see ``io.images.read_image``; or a
            list of these. With bands or a scale, and for a model of other channels, arrays are ``(H, W, bands)``.
        scales: factors that the image is resized by; their probabilities are averaged.
        flip: segment every scale mirrored, too.
        window: side of the windows in pixels, by default the configuration's.
        stride: pixels between windows, by default the configuration's, and never more than the window.
        batch_size: windows, or images that one window covers, that go through the model at once.
        bands: bands of the image that are the model's channels, counted from 1 as GDAL does, by default the
            configuration's, or the image's colours, or all its bands.
        scale: value of a pixel that stands for 1, by default the configuration's, or 255 for 8 bits, 65535 for 16.
        merge: merging of tokens instead of the model's own, see ``Segmenter.with_merging``.

    Returns:
        A prediction, or for a list one for each image, in order.

    Raises:
        TypeError, ValueError: an image or an option that cannot be used, naming it.
        OSError: an image file that does not exist or cannot be decoded.
    """
    settings = Settings.of(model.config, window, stride, scales, flip, batch_size, bands, scale)
    model = model if merge is None else model.with_merging(merge)
    if isinstance(image, (list, tuple)):
        return _predict_all(model, image, settings)
    return predict_raster(model, open_raster(image, channels=settings.channels), settings)


def check_raster(model: Model, raster: Raster, settings: Settings) -> None:
    """Refuse an image that would be too much work, see ``check_work``.

    Raises:
        ValueError: it would.
    """
    size = raster.height, raster.width
    if one_window(model, size, settings):
        return
    views = [(max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)) for scale in settings.scales]
    views *= 2 if settings.flip else 1
    enlarges = model.config.upscale_small_images
    check_work(size, [enlarged_size(view, settings.window) if enlarges else view for view in views], settings)


def predict_raster(model: Model, raster: Raster, settings: Settings, progress: Progress | None = None) -> Prediction:
    """``predict`` for an image that is open; ``progress`` as in ``slide_rows``."""
    check_raster(model, raster, settings)
    labels = np.empty((raster.height, raster.width), np.uint8 if model.config.num_classes <= 256 else np.int32)
    for top, band in label_bands(model, raster, settings, progress=progress):
        labels[top : top + len(band)] = band
    return Prediction(labels, raster, *class_table(model.config), model.config.label_values)


def predict_batch(model: Model, rasters: Sequence[Raster]) -> list[Prediction]:
    """Labels of open images of one size that one window covers, see ``one_window``; the same as those of each alone."""
    with evaluation_mode(model):
        labels = segment_images(model, [_whole(model, raster) for raster in rasters]).cpu().numpy()
    table = *class_table(model.config), model.config.label_values
    return [Prediction(own, raster, *table) for own, raster in zip(labels, rasters, strict=True)]


@torch.inference_mode()
def token_groups(model: Model, raster: Raster) -> np.ndarray:
    """Return the group of each patch, ``(h, w)``, of an open image that one window covers."""
    with evaluation_mode(model):
        return model.token_groups(_whole(model, raster))[0].cpu().numpy()


def one_window_size(model: Model, raster: Raster, settings: Settings) -> Pair | None:
    """Return the size (height, width) of an image that ``predict_batch`` takes, None for another one."""
    size = raster.height, raster.width
    return size if one_window(model, size, settings) else None


@torch.inference_mode()
def label_bands(
    model: Model, raster: Raster, settings: Settings, start: int = 0, progress: Progress | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (top, labels ``(h, W)``) of the rows of an image from ``start`` on, downwards; see ``predict``.

    The model is in evaluation mode, with no dropout or stochastic depth, from the first band to the last.
    """
    config, size = model.config, (raster.height, raster.width)
    with evaluation_mode(model):
        if one_window(model, size, settings):
            yield start, model.segment(_whole(model, raster))[0, start:].cpu().numpy()
            return
        enlarge_to = settings.window if config.upscale_small_images else None
        rows = Rows.of_raster(raster, config.mean, config.std, next(model.parameters()).device)
        images, flips = image_views(rows, settings.scales, settings.flip, enlarge_to)
        for top, labels in slide_rows(model, images, flips, size, settings, start=start, progress=progress):
            yield top, labels.cpu().numpy()


def _whole(model: Model, raster: Raster) -> Tensor:
    """Return the normalised image ``(1, C, H, W)`` on the model's device."""
    pixels = raster.read(0, raster.height)
    return normalise(pixels, model.config.mean, model.config.std, next(model.parameters()).device)


def _predict_all(model: Model, images: Sequence[ImageSource], settings: Settings) -> list[Prediction]:
    # One PIL image may stand in a list twice, and only one thread may read it.
    threads = side_threads() if all(isinstance(image, (str, os.PathLike)) for image in images) else 1
    ahead = threads + settings.batch_size

    def opened() -> Iterator[tuple[int, Raster]]:
        opens = partial(open_raster, channels=settings.channels)
        for index, raster in read_ahead(range(len(images)), lambda i: opens(images[i]), threads, ahead.__gt__):
            with _naming(index, images[index]):
                own = raster.result()
            yield index, own

    found: dict[int, Prediction] = {}
    for batch in in_batches(opened(), lambda image: one_window_size(model, image[1], settings), settings.batch_size):
        indices, rasters = zip(*batch, strict=True)
        with _naming(indices[0], images[indices[0]]):
            one = len(batch) == 1
            made = [predict_raster(model, rasters[0], settings)] if one else predict_batch(model, rasters)
        found |= zip(indices, made, strict=True)
    return [found[index] for index in range(len(images))]


@contextmanager
def _naming(index: int, image: ImageSource) -> Iterator[None]:
    """Name an image of a list in errors about it."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        kind = next(kind for kind in (FileNotFoundError, OSError, TypeError, ValueError) if isinstance(error, kind))
        path = f" ({os.fspath(image)})" if isinstance(image, (str, os.PathLike)) else ""
        raise kind(f"images[{index}]{path}: {error}") from error


def class_table(config: SegmenterConfig) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Return a name and a colour for each class: the model's own, or made ones."""
    names = config.class_names or tuple(f"class {index}" for index in range(config.num_classes))
    return names, config.palette or visualize.default_palette(config.num_classes)
