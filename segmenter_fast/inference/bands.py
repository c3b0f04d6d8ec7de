"""Sliding windows from patch-level masks straight to labels or probabilities, a band of rows at a time.

Everything up to the softmax is linear, so a band of output needs the masks of the window rows that cover it, and of
these only what ``composition`` says: no canvas, no full-size logits. Window rows are computed as the output advances
and dropped behind it, so that memory depends on the width of the image, not on its height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from ..config import Pair
from .settings import Settings
from .windows import Lattice, Windows

OUTPUTS = ("labels", "probabilities")


class Progress(Protocol):
    """A function that is told how many of all windows of an image are done."""

    def __call__(self, *, completed: int, total: int) -> object: ...


# Elements of a band: of its lattice, and of its probabilities where they are asked for. 64 MB of float32.
_BAND = 1 << 24


class Rows(Protocol):
    """One scale, mirrored or not, of an image, read a band at a time."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, top: int, bottom: int) -> Tensor:
        """``(1, 3, bottom - top, width)``, floating point, normalised, on the model's device."""


@dataclass(frozen=True)
class WholeImage:
    """An image in memory, ``(1, 3, h, w)``, as ``Rows``."""

    image: Tensor

    @property
    def height(self) -> int:
        return self.image.shape[2]

    @property
    def width(self) -> int:
        return self.image.shape[3]

    def read(self, top: int, bottom: int) -> Tensor:
        return self.image[:, :, top:bottom]


@torch.inference_mode()
def slide_rows(
    model: Callable[[Tensor], Tensor],
    images: Sequence[Rows],
    flips: Sequence[bool],
    size: Pair,
    window: int = 512,
    stride: int = 512,
    batch_size: int = 2,
    output: str = "labels",
    *,
    band: int | None = None,
    start: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``inference.slide`` for images that are read, and results that are written, a band of rows at a time.

    Windows are cut to images that are smaller; where small images shall be enlarged, ``images`` are enlarged already.

    Args:
        model, images, flips, size, window, stride, batch_size, output: as in ``slide``.
        band: rows of a result, by default as many as about 64 MB of scores stand for.
        start: the first row wanted. A run that goes on there gives what one from the top gives.
        progress: called after each batch where there are several windows; ``total`` is those of all images, and
            those that end above ``start`` count as completed.

    Yields:
        (top, rows): labels ``(h, W)`` or probabilities ``(K, h, W)`` of the rows from ``top`` on, downwards from
        ``start`` to the last row.

    Raises:
        ValueError: an argument out of range, or a model that gives scores of another shape than its windows ask for.
    """
    Settings(window, stride, batch_size=batch_size)
    if not len(images) or len(flips) != len(images):
        raise ValueError(f"flips must have one entry for each image, got {len(flips)} for {len(images)} images")
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if not 0 <= start < size[0]:
        raise ValueError(f"start must be a row of the {size[0]} of the result, got {start}")
    if band is not None and band < 1:
        raise ValueError(f"band must be at least 1 row, got {band}")
    scorer = _Scorer.of(model)
    layers = [
        _Layer(scorer, image, flip, size, window, stride, batch_size) for image, flip in zip(images, flips, strict=True)
    ]
    report = _Report(progress, sum(layer.total for layer in layers))
    op = kernels.lattice_argmax if output == "labels" else kernels.lattice_softmax
    while start < size[0]:
        if band is None:
            for layer in layers:
                layer.advance(start, start + 1, report)
            band = _band(layers, size, output)
        end = min(start + band, size[0])
        for layer in layers:
            layer.advance(start, end, report)
        yield start, op(*_joined([layer.points(start, end) for layer in layers]))
        start = end


def _band(layers: Sequence[_Layer], size: Pair, output: str) -> int:
    """Rows that keep lattice and result below ``_BAND`` elements, but never fewer than 8."""
    classes = layers[0].classes
    points = sum((len(layer.rows.start) - 1) * (len(layer.cols.start) - 1) for layer in layers)
    elements = points * classes / size[0] + size[1] * (classes if output == "probabilities" else 1)
    return max(int(_BAND / elements), 8)


@dataclass
class _Report:
    progress: Progress | None
    total: int
    done: int = 0

    def add(self, windows: int) -> None:
        self.done += windows
        if self.progress and self.total > 1:
            self.progress(completed=self.done, total=self.total)


@dataclass(frozen=True)
class _Scorer:
    """A model as scores of patches; one that gives logits only has patches of one pixel."""

    scores: Callable[[Tensor], Tensor]
    patch: int
    padded: bool

    @classmethod
    def of(cls, model: Callable[[Tensor], Tensor]) -> _Scorer:
        masks, config = getattr(model, "masks", None), getattr(model, "config", None)
        patch, size = (getattr(config, name, None) for name in ("patch_size", "upsample_to"))
        if callable(masks) and patch and size in ("padded", "image"):
            return cls(masks, patch, size == "padded")
        return cls(model, 1, False)


@dataclass(frozen=True)
class _Points:
    """What the kernels take of one image: lattice points, and which of them each row and column mixes."""

    scores: Tensor  # (N, K)
    rows: Tensor  # (2, h)
    row_weights: Tensor  # (h,)
    cols: Tensor  # (2, W)
    col_weights: Tensor  # (W,)


class _Layer:
    """One image: the masks of its windows, row by row, and the lattice that composes them."""

    def __init__(
        self, scorer: _Scorer, image: Rows, flip: bool, size: Pair, window: int, stride: int, batch_size: int
    ) -> None:
        self.scorer, self.image, self.batch_size = scorer, image, batch_size
        geometry = window, stride, scorer.patch, scorer.padded
        self.down, self.across = Windows.make(image.height, *geometry), Windows.make(image.width, *geometry)
        self.rows, self.cols = Lattice.make(self.down, size[0]), Lattice.make(self.across, size[1], flip)
        self.total = len(self.down.anchors) * len(self.across.anchors)
        self.done = 0  # windows
        self.first = 0  # window row of the first of ``held``
        self.held: list[Tensor] = []  # (grid, windows * grid, K): masks of a row of windows
        self.strip: tuple[int, Tensor] | None = None  # window row and pixels read last

    @property
    def classes(self) -> int:
        return self.held[0].shape[2]

    def window_rows(self, first: int, last: int) -> tuple[int, int]:
        """The rows of windows of outputs ``[first, last)``, from one to one past the last."""
        lowest, highest = self.rows.patches_of(*self.rows.used(first, last))
        return lowest // self.down.grid, highest // self.down.grid + 1

    def advance(self, first: int, last: int, report: _Report) -> None:
        """Hold the masks of all windows of outputs ``[first, last)``, and none above them."""
        begin, end = self.window_rows(first, last)
        del self.held[: begin - self.first]
        self.first, columns = begin, len(self.across.anchors)
        # Whole batches that no output needs are left out; the others stay, to the bit, those of a run from the top.
        if (skipped := begin * columns // self.batch_size * self.batch_size - self.done) > 0:
            self.done += skipped
            report.add(skipped)
        while self.done < end * columns:
            batch = range(self.done, min(self.done + self.batch_size, self.total))
            self._score(batch)
            self.done = batch.stop
            report.add(len(batch))

    def _score(self, batch: range) -> None:
        columns, height, width = len(self.across.anchors), self.down.window, self.across.window
        crops: Tensor | None = None
        for place, index in enumerate(batch):
            strip = self._strip(index // columns)
            left = self.across.anchors[index % columns]
            if crops is None:
                crops = strip.new_empty((len(batch), 3, height, width))
            crops[place] = strip[0, :, :, left : left + width]
        assert crops is not None
        scores = self.scorer.scores(crops)
        grid = self.down.grid, self.across.grid
        if scores.ndim != 4 or len(scores) != len(batch) or tuple(scores.shape[2:]) != grid:
            kind = "logits" if self.scorer.patch == 1 else "masks"
            wanted = f"({len(batch)}, K, {grid[0]}, {grid[1]})"
            raise ValueError(f"model must give {kind} {wanted} for its windows, got {tuple(scores.shape)}")
        for index, masks in zip(batch, scores, strict=True):
            row, column = divmod(index, columns)
            if row < self.first:
                continue
            if row == self.first + len(self.held):
                dtype = torch.promote_types(masks.dtype, torch.float32)
                self.held.append(masks.new_empty((grid[0], columns * grid[1], len(masks)), dtype=dtype))
            left = column * grid[1]
            self.held[row - self.first][:, left : left + grid[1]] = masks.permute(1, 2, 0)

    def _strip(self, row: int) -> Tensor:
        """``(1, 3, window, width)`` pixels of a row of windows."""
        if self.strip is None or self.strip[0] != row:
            self.strip = None  # never two of them
            top = self.down.anchors[row]
            self.strip = row, self.image.read(top, top + self.down.window)
        return self.strip[1]

    def points(self, first: int, last: int) -> _Points:
        """The lattice of outputs ``[first, last)``."""
        begin, end = self.rows.used(first, last)
        masks = torch.cat(self.held[: self.window_rows(first, last)[1] - self.first]).flatten(1)
        lattice = self.rows.evaluate(masks, begin, end, self.first * self.down.grid)  # (points, patches * K)
        height, width, classes = end - begin, len(self.cols.start) - 1, self.classes
        lattice = lattice.view(height, -1, classes).transpose(0, 1).flatten(1)
        scores = self.cols.evaluate(lattice, 0, width).view(-1, classes)
        rows = torch.stack([self.rows.lower[first:last], self.rows.upper[first:last]]) - begin
        cols = torch.stack([self.cols.lower, self.cols.upper]) * height
        row_weights, col_weights = self.rows.weight[first:last].to(scores), self.cols.weight.to(scores)
        return _Points(scores, rows.to(scores.device), row_weights, cols.to(scores.device), col_weights)


def _joined(points: Sequence[_Points]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of the kernels: points of all images one after the other."""
    offset, rows = 0, []
    for one in points:
        rows.append(one.rows + offset)
        offset += len(one.scores)
    scores = points[0].scores if len(points) == 1 else torch.cat([one.scores for one in points])
    weights = (torch.stack([getattr(one, name) for one in points]) for name in ("row_weights", "col_weights"))
    return scores, torch.stack(rows), next(weights), torch.stack([one.cols for one in points]), next(weights)
