"""Comparison of a model's inference forms on a user's own images: speed, memory and labels."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config import VARIANTS
from ..inference.folders import LABELS, plan
from ..inference.predict import class_table, predict
from ..segmenter import Segmenter
from .datasets.base import IGNORE
from .datasets.pairs import INVALID, Pair, PairedFiles, read_pixels
from .evaluation import ConfusionMatrix, side_by_side

FORMS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"quantize": "int8"},
    "fp8": {"quantize": "fp8"},
}
"""Arguments of ``Segmenter.optimize`` by the form's name; all are compared with the first."""
TIMED_IMAGES, REPEATS = 4, 3
"""Images that are timed, and how often after the call that counts the labels."""


@dataclass
class FormResult:
    """Figures of one form; ``images_per_second`` is None where it does not run."""

    name: str
    remark: str = ""
    """Reason why it does not run, or the warnings of ``optimize``."""
    images_per_second: float | None = None
    weight_bytes: int = 0
    """Memory of parameters and buffers."""
    agreement: float = 0.0
    """Share of all pixels that have the label of float32."""
    miou: float = 0.0
    """Mean IoU of the labels with those of float32."""
    labelled_miou: float | None = None
    """Mean IoU with the user's labels, where there are any."""
    worst: tuple[float, str, Image.Image] | None = field(default=None, repr=False)
    """Agreement on the image that changes most, its name, and a picture: image, float32's labels, this form's."""


def find_photos(inputs: Sequence[Path], labels: Path | None, num_classes: int) -> PairedFiles:
    """List images as ``plan`` does, with the paths of their labels, PNG files of the same names that may be missing.

    Pixels of label files are classes from 0 on, or 255, which does not count.

    Args:
        inputs: files and folders; a single folder with the folders ``images`` and ``labels`` names both.
        labels: folder with the tree of the images; None: no labels.

    Raises:
        FileNotFoundError: an input or the folder of labels does not exist.
        ValueError: no images, or no labels for any of them.
    """
    if labels is None and len(inputs) == 1 and all((inputs[0] / name).is_dir() for name in ("images", LABELS)):
        inputs, labels = [inputs[0] / "images"], inputs[0] / LABELS
    if labels is not None and not labels.is_dir():
        raise FileNotFoundError(f"folder of labels {labels} does not exist")
    out = labels or inputs[0]  # nothing is written there
    tree = Path(os.path.abspath(out)) / LABELS
    pairs = []
    for job in plan(inputs, out, overlay=False):
        name = job.labels.relative_to(tree)
        pairs.append(Pair(str(name.with_suffix("")), job.source, (labels or tree) / name))
    if labels is None:
        pairs = [Pair(pair.name, pair.image, Path()) for pair in pairs]
    elif not any(pair.labels.is_file() for pair in pairs):
        raise ValueError(f"no image has labels: expected files such as {pairs[0].labels}")
    table = np.full(256, INVALID, np.int16)
    table[:num_classes] = np.arange(min(num_classes, 256))
    table[IGNORE] = IGNORE
    return PairedFiles(tuple(map(str, range(num_classes))), (), tuple(pairs), (), table)


def compare_forms(
    model: Segmenter, photos: PairedFiles, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[FormResult]:
    """Segment images by every form of a float32 model, each image by all forms in turn.

    The rate is the number of images by the sum of each one's median time: from pixels to labels, without reading.

    Args:
        progress: called with the number of images that are done, and of all.

    Raises:
        OSError, ValueError: an image or its labels cannot be read, or do not fit each other, naming the file.
    """
    results, runs = [], []
    for name, options in FORMS.items():
        result = FormResult(name)
        results.append(result)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                runs.append(_Run(result, model.optimize(**options)))
            except (ValueError, RuntimeError) as error:
                result.remark = str(error)
                continue
        result.remark = "; ".join(str(warning.message) for warning in caught)
    for index, pair in enumerate(photos.pairs):
        pixels, target = photos.read(index) if pair.labels.is_file() else (read_pixels(pair.image), None)
        reference: np.ndarray | None = None
        for run in list(runs):
            try:
                labels = run.segment(pixels)
            except (RuntimeError, MemoryError) as error:
                if reference is None:
                    raise
                run.result.remark = str(error)
                runs.remove(run)
                continue
            reference = labels if reference is None else reference
            run.count(pair.name, pixels, labels, reference, target)
        if index < TIMED_IMAGES:
            for _ in range(REPEATS):
                for run in runs:
                    run.segment(pixels)
            for run in runs:
                run.time_of_image()
        progress(index + 1, len(photos))
    for run in runs:
        run.finish()
    return results


class _Run:
    """One form, and what is counted while it runs."""

    def __init__(self, result: FormResult, form: Any) -> None:
        self.result, self.form = result, form
        result.weight_bytes = sum(tensor.nbytes for tensor in (*form.parameters(), *form.buffers()))
        self.against_float32 = ConfusionMatrix(form.config.num_classes, ignore_index=-1)
        self.against_labels = ConfusionMatrix(form.config.num_classes, ignore_index=IGNORE)
        self.seconds, self.medians = list[float](), list[float]()

    def segment(self, pixels: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        labels = predict(self.form, pixels).labels
        self.seconds.append(time.perf_counter() - start)
        return labels

    def count(
        self, name: str, pixels: np.ndarray, labels: np.ndarray, reference: np.ndarray, target: np.ndarray | None
    ) -> None:
        found, result = torch.from_numpy(labels), self.result
        self.against_float32.update(found, torch.from_numpy(reference))
        if target is not None:
            self.against_labels.update(found, torch.from_numpy(target))
        agreement = float((labels == reference).mean())
        if result.worst is None or agreement < result.worst[0]:
            _, palette = class_table(self.form.config)
            result.worst = agreement, name, side_by_side(pixels, reference, labels, palette, ignore_index=-1)

    def time_of_image(self) -> None:
        """Take the median of the calls but the first, which compiles or warms up."""
        self.medians.append(statistics.median(self.seconds[1:]))
        self.seconds.clear()

    def finish(self) -> None:
        result, scores = self.result, self.against_float32.scores()
        result.images_per_second = len(self.medians) / sum(self.medians)
        result.agreement, result.miou = scores.aacc, scores.miou
        if self.against_labels.counts.any():
            result.labelled_miou = self.against_labels.scores().miou


def fastest(results: Sequence[FormResult], min_agreement: float) -> FormResult:
    """Return the fastest form that keeps a share of the labels; float32 keeps all."""
    kept = [result for result in results if result.images_per_second and result.agreement >= min_agreement]
    return max(kept, key=lambda result: result.images_per_second or 0.0)


def python_line(source: str, device: str, form: str) -> str:
    """Return the line of Python that makes a form of a checkpoint, or of a variant with random weights."""
    options = (
        json.dumps(value) if name == "dtype" else f"{name}={json.dumps(value)}" for name, value in FORMS[form].items()
    )
    random = source in VARIANTS and not Path(source).exists()
    load = f"sf.create_model({json.dumps(source)}).eval()" if random else f"sf.load({json.dumps(source)})"
    return f"model = {load}{'' if device == 'cpu' else f'.to({json.dumps(device)})'}.optimize({', '.join(options)})"
