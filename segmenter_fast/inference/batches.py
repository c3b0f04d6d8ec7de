"""Many images through one model: read ahead by threads, segmented in batches of one size, in evaluation mode."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..devices import usable_cores
from ..inference_segmenter import InferenceSegmenter
from ..segmenter import Segmenter

Model = Segmenter | InferenceSegmenter
Item = TypeVar("Item")
Content = TypeVar("Content")

# Sizes of images may alternate: this many batches are filled at once.
_OPEN_BATCHES = 4
BURST = 32
"""Images that each thread reads between batches, see ``works_in_bursts``."""


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Content],
    threads: int,
    room: Callable[[int], bool],
    bursts: bool = False,
) -> Iterator[tuple[Item, Future[Content]]]:
    """Yield each item with its content, or the error of reading it, in order; threads read the following ones.

    Args:
        room: whether one more item may be read while that many wait for their turn. One is always read.
        bursts: read only while the caller waits for an item: all that there is room for, which are then yielded.
    """
    left, waiting = iter(items), deque[tuple[Item, Future[Content]]]()

    pool = ThreadPoolExecutor(threads, "read")

    def fill(least: int) -> None:
        if bursts and len(waiting) >= least:
            return
        while len(waiting) < least or room(len(waiting)):
            following = list(itertools.islice(left, 1))
            if not following:
                return
            waiting.append((following[0], pool.submit(read, following[0])))
            if bursts and len(waiting) > 2 * threads:  # ``room`` may depend on what was read
                wait([waiting[-1 - 2 * threads][1]])

    try:
        fill(1)
        while waiting:
            wait([reading for _, reading in waiting] if bursts else [waiting[0][1]])
            item, reading = waiting.popleft()
            fill(0)
            yield item, reading
            fill(1)
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(
    items: Iterable[Item], size_of: Callable[[Item], Hashable | None], batch_size: int
) -> Iterator[list[Item]]:
    """Group items of one size, ``batch_size`` at most; items without a size stay alone, and batches may be left short.

    The groups depend on the items alone, not on the time that they take.
    """
    waiting: dict[Hashable, list[Item]] = {}
    for item in items:
        size = size_of(item)
        batch = [] if size is None else waiting.setdefault(size, [])
        batch.append(item)
        if size is None:
            yield batch
        elif len(batch) == batch_size:
            yield waiting.pop(size)
        elif len(waiting) > _OPEN_BATCHES:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


@torch.inference_mode()
def segment_images(model: Model, images: Sequence[Tensor]) -> Tensor:
    """Images ``(1, C, h, w)`` of one size -> labels ``(B, h, w)``; in halves where the memory is too small for all.

    Raises:
        RuntimeError, MemoryError: one image alone cannot be segmented.
    """
    try:
        return model.segment(images[0] if len(images) == 1 else torch.cat(list(images)))
    except (RuntimeError, MemoryError):  # RuntimeError: a GPU's memory is full
        if len(images) == 1:
            raise
    middle = len(images) // 2  # outside of the handler, whose error keeps the memory of the batch
    return torch.cat([segment_images(model, half) for half in (images[:middle], images[middle:])])


# Models inside of ``evaluation_mode``: the number of blocks, and the modules that were training before the first one.
_evaluated: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()
_evaluated_lock = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout or stochastic depth inside the block; afterwards every module is in the mode it was in.

    Threads may be in blocks of one model at once: the last one to leave restores the modes.
    """
    with _evaluated_lock:
        blocks, training = _evaluated.get(model, (0, []))
        if not blocks:
            training = [module for module in model.modules() if module.training]
            if training:
                model.eval()
        _evaluated[model] = blocks + 1, training
    try:
        yield
    finally:
        with _evaluated_lock:
            blocks, training = _evaluated.pop(model)
            if blocks > 1:
                _evaluated[model] = blocks - 1, training
            else:
                for module in training:
                    module.training = True


def works_in_bursts(model: Model) -> bool:
    """True where threads read and write between batches, not beside them: where the model runs on their cores."""
    return next(model.parameters()).device.type == "cpu"


def side_threads() -> int:
    """Threads that decode images beside the model, and as many that write them: the cores, 8 at most."""
    return min(usable_cores(), 8)
