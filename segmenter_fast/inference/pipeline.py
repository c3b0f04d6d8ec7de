"""Many images as files: decoded ahead by threads, segmented in batches of one size, written behind by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

from ..config import Pair
from ..io import images
from ..io.images import Raster
from .batches import Model, in_batches, read_ahead, side_threads
from .folders import Job, in_memory, run_by_rows, write_outputs
from .predict import Prediction, predict_batch, predict_raster
from .settings import Settings, one_window
from .sliding import Progress

PIXELS_IN_FLIGHT = images.LARGE_PIXELS
"""Pixels of the images that are decoded ahead or still written: about 200 MB, and 64 MB of labels."""
FAILURES = (OSError, ValueError, RuntimeError, MemoryError)
"""Errors that concern one image of many. RuntimeError: the memory of a GPU is full."""


def run_all(
    model: Model,
    jobs: Sequence[Job],
    settings: Settings,
    begin: Callable[[Job], Progress | None],
    end: Callable[[Job, str | None, Exception | None], object],
    *,
    name: str = "",
    resume: bool = False,
) -> None:
    """``folders.run`` for many images, with the same outputs; an error in one does not stop the others.

    At most ``PIXELS_IN_FLIGHT`` are in memory at a time, beside a batch and unless one image has more. An interrupt
    lets the threads finish the images that are segmented; no other is begun.

    Args:
        begin: called with an image that may take several windows; returns its ``progress``.
        end: called once for each image, in the order in which they end, with what ``run`` returned or raised.
    """
    threads = side_threads()
    with ThreadPoolExecutor(threads, "write") as pool:
        run = _Run(model, settings, begin, end, name, resume, pool, threads)
        try:
            for batch in in_batches(run.opened(jobs), run.size_of, settings.batch_size):
                run.segment(batch)
                run.finish(2 * run.ahead)
        finally:
            run.finish(0)


@dataclass
class _Run:
    """The state of one ``run_all``: the images that are segmented already, and the pixels of all that are open."""

    model: Model
    settings: Settings
    begin: Callable[[Job], Progress | None]
    end: Callable[[Job, str | None, Exception | None], object]
    name: str
    resume: bool
    pool: ThreadPoolExecutor
    threads: int
    writing: deque[tuple[Job, Raster, Future[None]]] = field(default_factory=deque)
    held: int = 0
    largest: int = 0  # pixels of one image

    @property
    def ahead(self) -> int:
        """Images that are read before their turn."""
        return self.threads + self.settings.batch_size

    def opened(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Raster]]:
        """Yield the images that can be read, and end the others."""
        for job, reading in read_ahead(jobs, lambda job: images.open_raster(job.source), self.threads, self._room):
            try:
                raster = reading.result()
            except FAILURES as error:
                self.end(job, None, error)
                continue
            self.held += _pixels(raster)
            self.largest = max(self.largest, _pixels(raster))
            yield job, raster

    def _room(self, waiting: int) -> bool:
        return waiting < self.ahead and self.held + (waiting + 1) * self.largest <= PIXELS_IN_FLIGHT

    def size_of(self, image: tuple[Job, Raster]) -> Pair | None:
        """Return the size (height, width) of an image that may be segmented with others, None for the rest."""
        size = image[1].height, image[1].width
        return size if in_memory(*image) and one_window(self.model, size, self.settings) else None

    def segment(self, batch: Sequence[tuple[Job, Raster]]) -> None:
        """Segment images and hand them to the writing threads."""
        predictions: list[Prediction] = []
        if len(batch) > 1:
            with suppress(*FAILURES):  # each image alone, below, has its own result or error
                predictions = predict_batch(self.model, [raster for _, raster in batch])
        for (job, raster), prediction in zip(batch, predictions, strict=False):
            self._write(job, raster, prediction)
        for job, raster in batch[len(predictions) :]:
            try:
                if in_memory(job, raster):
                    prediction = predict_raster(self.model, raster, self.settings, self.begin(job))
                    self._write(job, raster, prediction)
                else:
                    arguments = self.settings, self.name, self.resume, self.begin(job)
                    self._close(job, raster, run_by_rows(self.model, job, raster, *arguments))
            except FAILURES as error:
                self._close(job, raster, error=error)

    def _write(self, job: Job, raster: Raster, prediction: Prediction) -> None:
        self.writing.append((job, raster, self.pool.submit(write_outputs, job, prediction)))

    def finish(self, left: int) -> None:
        """Close the images that are written; wait while more than ``left`` are not, or too much is held."""
        while self.writing and (len(self.writing) > left or self.held > PIXELS_IN_FLIGHT or self.writing[0][2].done()):
            wait([self.writing[0][2]])
            job, raster, written = self.writing.popleft()
            error = written.exception()
            if error is not None and not isinstance(error, FAILURES):
                raise error
            self._close(job, raster, error=error)

    def _close(self, job: Job, raster: Raster, restarted: str | None = None, error: Exception | None = None) -> None:
        self.held -= _pixels(raster)
        self.end(job, restarted, error)


def _pixels(raster: Raster) -> int:
    """Pixels that an open image holds in memory."""
    return raster.height * raster.width if isinstance(raster, images.Pixels) else 0
