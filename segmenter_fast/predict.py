"""From one image, of any kind and size, to its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import visualize
from .images import ImageSource, normalise, read_image
from .inference import check_windows, fits_one_window, scaled_and_flipped, slide
from .segmenter import Segmenter
from .visualize import Color


@dataclass(frozen=True, eq=False)
class Prediction:
    """The labels of one image, at the image's own size."""

    labels: np.ndarray
    """``(H, W)`` class indices, uint8 up to 256 classes and int32 above."""
    image: np.ndarray
    """``(H, W, 3)`` uint8: the RGB pixels that were segmented, upright."""
    class_names: tuple[str, ...]
    """One name per class; "class 0", "class 1", ... where the model has none."""
    palette: tuple[Color, ...]
    """RGB per class, the model's own or ``visualize.default_palette``."""

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


@torch.inference_mode()
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

    Where a single window covers the image as it is, the labels come from ``model.segment``, without any logits;
    otherwise from ``inference.slide``.

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
    config = model.config
    pixels = read_image(image)
    size = pixels.shape[0], pixels.shape[1]
    window = config.window_size if window is None else window
    stride = min(config.window_stride, window) if stride is None else stride
    check_windows(window, stride, batch_size)
    weights = next(model.parameters())
    whole = normalise(pixels, config.mean, config.std, weights.device)
    with _evaluating(model):
        plain = tuple(scales) == (1.0,) and not flip
        if plain and fits_one_window(model, size, window):
            labels = model.segment(whole)[0]
        else:
            images, flips = scaled_and_flipped(whole, scales, flip)
            labels = slide(model, images, flips, size, window, stride, batch_size)
    return Prediction(
        labels=_to_array(labels, config.num_classes),
        image=pixels,
        class_names=config.class_names or tuple(f"class {index}" for index in range(config.num_classes)),
        palette=config.palette or visualize.default_palette(config.num_classes),
    )


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
