"""Many images as files: decoded ahead by threads, segmented in batches of one size, written behind by threads.

On a CPU the threads work between the batches, in bursts of many images, so that the model has all cores. On two AMD
EPYC cores (T/16, bfloat16, 512 px) that gives 91 % of the images a second of ``segment`` alone, threads beside
the model 86 to 90 %.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from ..config import Pair
from ..io import images
from ..io.images import Raster
from .batches import BURST, Model, in_batches, read_ahead, side_threads, works_in_bursts
from .folders import Job, draw_tokens, in_memory, run_by_rows, write_outputs
from .predict import Prediction, one_window_size, predict_batch, predict_raster
from .resume import describe_run
from .settings import Settings
from .sliding import Progress

PIXELS_IN_FLIGHT = images.LARGE_PIXELS
"""Pixels of the images that are decoded ahead or still written: about 200 MB, and 64 MB of labels."""
_WRITERS = 4  # threads a core, in bursts: half of the time of a write is the disk's
_BURST_SECONDS = 1.0  # after which those that are segmented are written, so that a slow model shows progress
FAILURES = (OSError, ValueError, RuntimeError, MemoryError)
"""Errors that concern one image of many. RuntimeError: the memory of a GPU is full."""


def run_all(
    model: Model,
    jobs: Sequence[Job],
    settings: Settings,
    begin: Callable[[Job], Progress | None],
    end: Callable[[Job, str | None, Exception | None], object],
    *,
    run: dict[str, Any] | None = None,
    resume: bool = False,
) -> None:
    """Segment images and write the outputs of each, the labels last; an error in one does not stop the others.

    At most ``PIXELS_IN_FLIGHT`` are in memory at a time, beside a batch and unless one image has more. An interrupt
    lets the threads finish the images that are segmented; no other is begun.

    Args:
        begin: called with an image that may take several windows; returns its ``progress``, as in ``slide_rows``.
        end: called once for each image, in the order in which they end, with what ``run_by_rows`` returned, and with
            the error that the image had.
        run: for the records in the outputs; ``describe_run`` by default.
        resume: as in ``run_by_rows``.
    """
    described = describe_run(model, settings) if run is None else run
    threads, bursts = side_threads(), works_in_bursts(model)
    ahead = max(BURST * threads, settings.batch_size) if bursts else threads + settings.batch_size
    segmented = deque[tuple[Job, Raster, Prediction]]()
    writing = deque[tuple[Job, Raster, Future[None]]]()
    held = largest = 0  # pixels: of all images that are open, of one of them
    begun = time.monotonic()  # to write

    def room(waiting: int) -> bool:
        return waiting < ahead and held + (waiting + 1) * largest <= PIXELS_IN_FLIGHT

    def read(job: Job) -> Raster:
        nonlocal largest
        raster = images.open_raster(job.source, job.page, settings.channels)
        largest = max(largest, _pixels(raster))
        return raster

    def opened() -> Iterator[tuple[Job, Raster]]:
        nonlocal held
        for job, reading in read_ahead(jobs, read, threads, room, bursts):
            try:
                raster = reading.result()
                draw_tokens(model, job, raster, settings, described)
            except FAILURES as error:
                end(job, None, error)
                continue
            held += _pixels(raster)
            yield job, raster

    def close(job: Job, raster: Raster, restarted: str | None = None, error: Exception | None = None) -> None:
        nonlocal held
        held -= _pixels(raster)
        end(job, restarted, error)

    def write() -> None:
        nonlocal begun
        while segmented:
            job, raster, prediction = segmented.popleft()
            writing.append((job, raster, pool.submit(write_outputs, job, prediction, described)))
        begun = time.monotonic()

    def segment(batch: Sequence[tuple[Job, Raster]]) -> None:
        if len(batch) > 1:
            with suppress(*FAILURES):  # below, each image alone has its own result or error
                predictions = predict_batch(model, [raster for _, raster in batch])
                segmented.extend((*image, own) for image, own in zip(batch, predictions, strict=True))
                return
        for job, raster in batch:
            try:
                if in_memory(job, raster):
                    segmented.append((job, raster, predict_raster(model, raster, settings, begin(job))))
                else:
                    close(job, raster, run_by_rows(model, job, raster, settings, described, resume, begin(job)))
            except FAILURES as error:
                close(job, raster, error=error)

    def finish(left: int) -> None:  # wait while more than ``left`` are not written, or too many pixels are held
        while writing and (len(writing) > left or held > PIXELS_IN_FLIGHT or writing[0][2].done()):
            wait([writing[0][2]])
            job, raster, written = writing.popleft()
            error = written.exception()
            if error is not None and not isinstance(error, FAILURES):
                raise error
            close(job, raster, error=error)

    def size_of(image: tuple[Job, Raster]) -> Pair | None:
        return one_window_size(model, image[1], settings) if in_memory(*image) else None

    with ThreadPoolExecutor(threads * (_WRITERS if bursts else 1), "write") as pool:
        try:
            for batch in in_batches(opened(), size_of, settings.batch_size):
                finish(0 if bursts else 2 * ahead)
                segment(batch)
                late = time.monotonic() - begun > _BURST_SECONDS or held > PIXELS_IN_FLIGHT
                if not bursts or late or len(segmented) >= ahead:
                    write()
        finally:
            write()
            finish(0)


def _pixels(raster: Raster) -> int:
    """Pixels that an open image holds in memory, as if of RGB of 8 bits."""
    return raster.pixels.nbytes // 3 if isinstance(raster, images.Pixels) else 0
