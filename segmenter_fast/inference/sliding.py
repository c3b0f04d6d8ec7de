"""Sliding windows with several scales and flips, composed as the official program composes them.

Window logits are averaged per pixel, the average is resized bilinearly to the original size and flipped back, and the
softmaxes of all scales and flips are averaged. Everything up to the softmax is linear, so a band of output rows needs
only the patch-level masks of the windows that cover it, see ``windows``: no canvas, no full-size logits. Windows are
computed as the output advances and dropped behind it, so that memory depends on the width of the image, not its height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from ..config import Pair
from .rows import Rows, enlarged_size
from .settings import Settings, check_work, enlarges_small_images
from .windows import Lattice, Windows

OUTPUTS = ("labels", "probabilities")
# Elements of a band: of its lattice, and of its probabilities where they are asked for. 64 MB of float32.
_BAND_ELEMENTS = 1 << 24


class Progress(Protocol):
    """A function that is told how many of all windows of an image are done."""

    def __call__(self, *, completed: int, total: int) -> object: ...


@torch.inference_mode()
def slide(
    model: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    flips: Sequence[bool],
    size: Pair,
    window: int = 512,
    stride: int = 512,
    batch_size: int = 2,
    output: str = "labels",
) -> Tensor:
    """Segment one image, given at several scales and mirrored or not, window by window.

    An image whose smaller side is below the window is enlarged until that side equals the window, unless the model's
    configuration says ``upscale_small_images=False``: windows are then cut to the image.

    Args:
        model: any callable from normalised ``(B, C, h, w)`` to ``(B, K, h, w)`` logits, in evaluation mode.
        images: ``(1, C, h, w)`` floating point tensors on the model's device, one for each scale and flip.
        flips: which of the images are mirrored left to right.
        size: (height, width) in pixels of the result, the original image's.
        window: side in pixels of the square windows.
        stride: pixels from one window to the next; the last window of a row or column ends at the border.
        batch_size: windows that go through the model at once.
        output: "labels" or "probabilities".

    Returns:
        "labels": ``(H, W)``, uint8 up to 256 classes and int32 above; ties go to the lowest class.
        "probabilities": ``(K, H, W)`` in float32, or float64 for a float64 model.

    Raises:
        ValueError, TypeError: an argument out of range or of a wrong shape or dtype, pixels that are NaN or infinite,
            and a stride above the window, which would leave pixels without a prediction.

    Source: the official program's inference, and mmsegmentation's where images are not enlarged.
    """
    settings = Settings(window, stride, batch_size=batch_size)
    _check_images(images, size, getattr(getattr(model, "config", None), "in_channels", 3))
    rows = [Rows.of_tensor(image) for image in images]
    enlarges = enlarges_small_images(model)
    sizes = [(image.height, image.width) for image in rows]
    check_work(size, [enlarged_size(each, window) if enlarges else each for each in sizes], settings)
    if enlarges:
        rows = [image.enlarged(window) for image in rows]
    result: Tensor | None = None
    for top, band in slide_rows(model, rows, flips, size, settings, output):
        if result is None:
            result = band.new_empty((*band.shape[:-2], *size))
        result[..., top : top + band.shape[-2], :] = band
    assert result is not None
    return result


@torch.inference_mode()
def slide_rows(
    model: Callable[[Tensor], Tensor],
    images: Sequence[Rows],
    flips: Sequence[bool],
    size: Pair,
    settings: Settings,
    output: str = "labels",
    *,
    band: int | None = None,
    start: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """``slide`` for images that are read, and results that are written, a band of rows at a time.

    Windows are cut to images that are smaller; where small images shall be enlarged, ``images`` are enlarged already.

    Args:
        model, images, flips, size, output: as in ``slide``.
        settings: window, stride and batch size; scales and flips are those of ``images``.
        band: rows of a result, by default as many as about 64 MB of scores stand for.
        start: the first row wanted. A run that continues there gives the same rows as one from the top.
        progress: called after each batch where there are several windows; ``total`` is those of all images, and those
            that end above ``start`` count as completed.

    Yields:
        (top, rows): labels ``(h, W)`` or probabilities ``(K, h, W)`` of the rows from ``top`` on, downwards from
        ``start`` to the last row.

    Raises:
        ValueError: an argument out of range, or a model that gives scores of another shape than its windows ask for.
    """
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if len(flips) != len(images):
        raise ValueError(f"flips must have one entry for each of the {len(images)} images, got {len(flips)}")
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if not 0 <= start < size[0]:
        raise ValueError(f"start must be a row of the {size[0]} of the result, got {start}")
    if band is not None and band < 1:
        raise ValueError(f"band must be at least 1 row, got {band}")
    scores, patch, padded = _patch_scores(model)
    geometry = settings.window, settings.stride, patch, padded
    down = [Lattice.make(Windows.make(image.height, *geometry), size[0]) for image in images]
    across = [Lattice.make(Windows.make(images[i].width, *geometry), size[1], flip) for i, flip in enumerate(flips)]
    views = [ImageView(scores, *parts, settings.batch_size) for parts in zip(images, down, across, strict=True)]
    total = sum(view.total for view in views)

    def report() -> None:
        if progress is not None and total > 1:
            progress(completed=sum(view.done for view in views), total=total)

    op = kernels.lattice_argmax if output == "labels" else kernels.lattice_softmax
    while start < size[0]:
        if band is None:
            views[0].advance(views[0].down.needed(start, start + 1), report)
            classes = views[0].held[0].shape[2]
            points = sum((len(view.down.start) - 1) * (len(view.across.start) - 1) for view in views)
            elements = points * classes / size[0] + size[1] * (classes if output == "probabilities" else 1)
            band = max(int(_BAND_ELEMENTS / elements), 8)
        end = min(start + band, size[0])
        needed = [view.down.needed(start, end) for view in views]
        for view, ranges in zip(views, needed, strict=True):
            view.advance(ranges, report)
        yield start, op(*_lattice(views, start, end))
        start = end


class ImageView:
    """One scale of an image, mirrored or not: the masks of its windows, row by row, and the lattice that mixes them."""

    def __init__(
        self, scores: Callable[[Tensor], Tensor], image: Rows, down: Lattice, across: Lattice, batch_size: int
    ) -> None:
        self.scores, self.image, self.down, self.across, self.batch_size = scores, image, down, across, batch_size
        self.columns = len(across.windows.anchors)
        self.total = len(down.windows.anchors) * self.columns
        self.done = 0  # windows
        self.needed = range(0), range(0)  # points of ``down`` and rows of windows
        self.held: list[Tensor] = []  # (grid, columns * grid, K): masks of rows of windows, from the first needed one
        self.strip_row, self.strip = -1, torch.empty(0)  # row of windows whose pixels were read last, and the pixels

    def advance(self, needed: tuple[range, range], report: Callable[[], None]) -> None:
        """Hold the masks of the needed rows of windows, and none above them; see ``Lattice.needed``."""
        rows = needed[1]
        del self.held[: rows.start - self.needed[1].start]
        self.needed = needed
        # Leave out whole batches that no output needs. The others give, to the bit, the masks of a run from the top.
        if (skipped := rows.start * self.columns // self.batch_size * self.batch_size - self.done) > 0:
            self.done += skipped
            report()
        while self.done < rows.stop * self.columns:
            batch = range(self.done, min(self.done + self.batch_size, self.total))
            self._score(batch)
            self.done = batch.stop
            report()

    def _score(self, batch: range) -> None:
        """Hold the masks of these windows, which are counted row by row."""
        down, across = self.down.windows, self.across.windows
        crops: Tensor | None = None
        for place, index in enumerate(batch):
            row, column = divmod(index, self.columns)
            if row != self.strip_row:
                self.strip = torch.empty(0)  # free the last strip before the next is read
                self.strip_row, top = row, down.anchors[row]
                self.strip = self.image.read(top, top + down.window)
            if crops is None:
                crops = self.strip.new_empty((len(batch), self.strip.shape[1], down.window, across.window))
            left = across.anchors[column]
            crops[place] = self.strip[0, :, :, left : left + across.window]
        assert crops is not None
        scores = self.scores(crops)
        if scores.ndim != 4 or scores.shape[0] != len(batch) or scores.shape[2:] != (down.grid, across.grid):
            kind = "logits" if down.grid == down.window else "masks"
            wanted = f"({len(batch)}, K, {down.grid}, {across.grid})"
            raise ValueError(f"model must give {kind} {wanted} for its windows, got {tuple(scores.shape)}")
        first = self.needed[1].start
        for index, masks in zip(batch, scores, strict=True):
            row, column = divmod(index, self.columns)
            if row < first:
                continue
            if row == first + len(self.held):
                dtype = torch.promote_types(masks.dtype, torch.float32)
                self.held.append(masks.new_empty((down.grid, self.columns * across.grid, len(masks)), dtype=dtype))
            left = column * across.grid
            self.held[row - first][:, left : left + across.grid] = masks.permute(1, 2, 0)

    def points(self, first: int, last: int, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the lattice kernels for outputs ``[first, last)``; points are counted from ``offset``."""
        down, across = self.down, self.across
        points, rows = self.needed
        masks = torch.cat(self.held[: len(rows)])  # (patches down, patches across, K)
        classes = masks.shape[2]
        scores = down.evaluate(masks.flatten(1), points, rows.start * down.windows.grid)
        scores = scores.view(len(points), -1, classes).transpose(0, 1).flatten(1)  # (patches across, points * K)
        scores = across.evaluate(scores, range(len(across.start) - 1)).view(-1, classes)
        mixed_rows = torch.stack([down.lower[first:last], down.upper[first:last]]) - points.start + offset
        mixed_columns = torch.stack([across.lower, across.upper]) * len(points)
        return (
            scores,
            mixed_rows.to(scores.device),
            down.weight[first:last].to(scores),
            mixed_columns.to(scores.device),
            across.weight.to(scores),
        )


def _lattice(views: Sequence[ImageView], first: int, last: int) -> list[Tensor]:
    """Join the points of all views: the arguments of the lattice kernels for outputs ``[first, last)``."""
    parts, offset = [], 0
    for view in views:
        parts.append(view.points(first, last, offset))
        offset += len(parts[-1][0])
    scores, *mixes = zip(*parts, strict=True)
    return [scores[0] if len(scores) == 1 else torch.cat(scores), *(torch.stack(mix) for mix in mixes)]


def _patch_scores(model: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], int, bool]:
    """Return a function from images to scores of patches, the patches' side, and whether scores cover whole patches.

    A model that gives logits only has patches of one pixel.
    """
    masks, config = getattr(model, "masks", None), getattr(model, "config", None)
    patch, upsampled = (getattr(config, name, None) for name in ("patch_size", "upsample_to"))
    if callable(masks) and patch and upsampled in ("padded", "image"):
        return masks, patch, upsampled == "padded"
    return model, 1, False


def _check_images(images: Sequence[Tensor], size: Pair, channels: int) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, each at least 1, got {tuple(size)}")
    for index, image in enumerate(images):
        if image.ndim != 4 or image.shape[:2] != (1, channels) or min(image.shape[2:]) < 1:
            raise ValueError(f"images[{index}] must be (1, {channels}, h, w), got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"images[{index}] must be floating point and normalised, got {image.dtype}")
        if not image.isfinite().all():
            raise ValueError(f"images[{index}] must be finite, but has pixels that are NaN or infinite")
