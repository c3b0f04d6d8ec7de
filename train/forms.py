"""Comparison of a model's inference forms on a user's own images: speed, memory and labels."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..classes import ClassList, Color
from ..config import VARIANTS, SegmenterConfig
from ..inference.folders import LABELS, plan
from ..inference.predict import class_table, predict_raster
from ..inference.settings import Settings
from ..io.images import Pixels
from ..segmenter import Segmenter
from ..token_merging import MERGING
from ..visualize import displayed, side_by_side
from .datasets.base import IGNORE
from .datasets.class_lists import ReadOptions, color_table
from .datasets.colors import named_colors
from .datasets.layouts import LAYOUTS, value_table
from .datasets.pairs import LABEL_SUFFIXES, Pair, PairedFiles, read_pixels
from .evaluation import ConfusionMatrix, Scores

EXACT = "exact"
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"dtype": name} for name in ("float32", "bfloat16", "float16")},
    **{name: {"quantize": name} for name in ("int8", "fp8")},
    **{f"merge {name}": {"merge": name} for name in MERGING},
    EXACT: {"dtype": "float32", "merge": "none"},
}
"""Arguments of ``Segmenter.optimize`` by the form's name; all are compared with the first. EXACT only if it merges."""
TIMED_IMAGES, REPEATS = 4, 3
"""Images that are timed, and how often after the call that counts the labels."""


class Form:
    """One form, and what is counted while it segments; ``remark`` says why it does not run, or what it warned of."""

    def __init__(self, name: str, model: Segmenter) -> None:
        self.name, self.runs, classes = name, True, model.config.num_classes
        self.against_float32 = ConfusionMatrix(classes, ignore_index=-1)
        self.against_labels = ConfusionMatrix(classes, ignore_index=IGNORE)
        self.seconds, self.medians = list[float](), list[float]()
        self.worst: tuple[float, str, Image.Image] | None = None
        """Agreement on the image that changes most, its name, and a picture: image, float32's labels, this form's."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.model: Any = model.optimize(**FORMS[name])
            except (ValueError, RuntimeError) as error:
                self.fail(error)
                return
        self.remark = "; ".join(str(warning.message) for warning in caught)

    def fail(self, error: Exception) -> None:
        self.runs, self.remark, self.model = False, str(error), None

    def segment(self, pixels: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        labels = predict_raster(self.model, Pixels(pixels), Settings.of(self.model.config)).labels
        self.seconds.append(time.perf_counter() - start)
        return labels

    def count(self, name: str, pixels: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> None:
        self.against_float32.update(torch.from_numpy(labels), torch.from_numpy(reference))
        agreement = float((labels == reference).mean())
        if self.worst is None or agreement < self.worst[0]:
            names, palette = class_table(self.model.config)
            titles = "image", "float32", f"{self.name}, {agreement:.2%} the same"
            drawn = displayed(pixels), reference, labels
            self.worst = agreement, name, side_by_side(*drawn, palette, names, -1, titles)

    @property
    def images_per_second(self) -> float:
        """Number of timed images by the sum of their median times: from pixels to labels, without reading."""
        return len(self.medians) / sum(self.medians)

    @property
    def weight_bytes(self) -> int:
        """Memory of parameters, buffers and packed copies of weights."""
        packed = (module.weight for module in self.model.modules() if getattr(module, "packed", None) is not None)
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *packed))

    @property
    def scores(self) -> Scores:
        """Agreement with the labels of float32; ``aacc`` is the share of the pixels."""
        return self.against_float32.scores()


def find_photos(
    inputs: Sequence[Path], labels: Path | None, config: SegmenterConfig, options: ReadOptions | None = None
) -> PairedFiles:
    """List images as ``plan`` does, with their labels, PNG or TIFF files of the same names, which may be missing.

    Pixels of label files are the model's label values, by default classes from 0 on, or 255, which does not count; or
    colours of its palette. A single input with the folders ``images`` and ``labels`` names both.

    Args:
        config: of the model.

    Raises:
        FileNotFoundError: an input or the folder of labels does not exist.
        ValueError: no images, or no labels for any of them.
    """
    if labels is None and len(inputs) == 1 and all((inputs[0] / name).is_dir() for name in ("images", LABELS)):
        inputs, labels = [inputs[0] / "images"], inputs[0] / LABELS
    if labels is not None and not labels.is_dir():
        raise FileNotFoundError(f"folder of labels {labels} does not exist")
    absolute = [Path(os.path.abspath(path)) for path in inputs]
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in absolute]))
    pairs = []
    for job in plan(inputs, labels or root, overlay=False, root=root, keep_suffix=True):  # nothing is written there
        name = job.source.relative_to(root)
        named = (f"{stem}{end}" for end in LABEL_SUFFIXES for stem in (name.with_suffix(""), name))
        files = [labels / own for own in named] if labels else [Path()]
        pairs.append(Pair(str(name), job.source, next(filter(Path.is_file, files), files[0])))
    if labels is not None and not any(pair.labels.is_file() for pair in pairs):
        raise ValueError(f"no image has labels: expected files such as {pairs[0].labels}")
    options, names = options or ReadOptions(), class_table(config)[0][:IGNORE]  # 255 is no class in label files
    palette, ignored = config.palette, list[Color]()
    if options.palette:
        given, ignored = named_colors(options.palette, names)
        palette = tuple(given)
    reduced = options.reduce_zero_label or config.label_values == tuple(range(1, len(names) + 1))
    values, colored = () if reduced else config.label_values, len(palette) == len(names)
    classes = ClassList(names, palette, values, colored, tuple(ignored), reduced)
    table = value_table(LAYOUTS["folder"], classes)
    colors = color_table(classes, table)
    return PairedFiles(names, palette, tuple(pairs), (), {}, table, colors=colors, page=options.page)


def compare_forms(
    model: Segmenter,
    photos: PairedFiles,
    progress: Callable[[int], None],
    broken: Callable[[Exception], object] | None = None,
) -> list[Form]:
    """Segment images by every form of a float32 model, each image by all forms in turn.

    Args:
        progress: called with the number of images that are done.
        broken: called with the error of each image that is left out as it cannot be read; None raises it.

    Raises:
        OSError, ValueError: an image or its labels cannot be read, or do not fit each other, naming the file; with
            ``broken`` if there is no other image.
    """
    forms, seen = [Form(name, model) for name in FORMS if name != EXACT or model.config.merging is not None], 0
    for index, pair in enumerate(photos.pairs):
        try:
            pixels, target = (
                photos.read(index)
                if pair.labels.is_file()
                else (read_pixels(pair.image, photos.page or 0, photos.channels), None)
            )
        except OSError as error:
            if broken is None or (not seen and index + 1 == len(photos)):
                raise
            broken(error)
            progress(index + 1)
            continue
        seen += 1
        reference = forms[0].segment(pixels)
        for form in filter(lambda form: form.runs, forms):
            try:
                labels = reference if form is forms[0] else form.segment(pixels)
            except (RuntimeError, MemoryError) as error:
                form.fail(error)
                continue
            form.count(pair.name, pixels, labels, reference)
            if target is not None:
                form.against_labels.update(torch.from_numpy(labels), torch.from_numpy(target))
        running = [form for form in forms if form.runs]
        if seen <= TIMED_IMAGES:
            for form in running * REPEATS:
                form.segment(pixels)
            for form in running:
                form.medians.append(statistics.median(form.seconds[-REPEATS:]))
        progress(index + 1)
    return forms


def python_line(source: str, device: str, form: str) -> str:
    """Return the line of Python that makes a form of a checkpoint, or of a variant with random weights."""
    random = source in VARIANTS and not Path(source).exists()
    load = f"sf.create_model({json.dumps(source)}).eval()" if random else f"sf.load({json.dumps(source)})"
    place = "" if device == "cpu" else f".to({json.dumps(device)})"
    given = ", ".join(f'{"" if key == "dtype" else f"{key}="}"{value}"' for key, value in FORMS[form].items())
    return f"model = {load}{place}.optimize({given})"
