"""Items read ahead in order, grouped by size, segmented in halves where memory is short."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from segmenter_fast.inference.batches import evaluation_mode, in_batches, read_ahead, segment_images
from support.models import windowed


@pytest.mark.parametrize("bursts", [False, True])
def test_items_come_in_order_and_an_error_in_its_place(bursts: bool) -> None:
    def read(item: int) -> int:
        if item == 2:
            raise OSError("broken")
        return item * 10

    found = list(read_ahead(range(5), read, 3, lambda waiting: waiting < 4, bursts))
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]
    assert [str(reading.exception() or reading.result()) for _, reading in found] == ["0", "10", "broken", "30", "40"]


@pytest.mark.parametrize("bursts", [False, True])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_is_read_than_there_is_room_for(most: int, bursts: bool) -> None:
    begun: list[int] = []
    for item, _ in read_ahead(range(9), begun.append, 2, lambda waiting: waiting < most, bursts):
        assert len(begun) <= item + 1 + most
    assert sorted(begun) == list(range(9))


def test_bursts_are_over_before_the_first_of_them_is_yielded() -> None:
    ended: list[int] = []

    def read(item: int) -> None:
        time.sleep(0.002)
        ended.append(item)

    seen = []
    for _ in read_ahead(range(10), read, 2, lambda waiting: waiting < 4, bursts=True):
        seen.append(len(ended))
        time.sleep(0.01)
        assert len(ended) == seen[-1]
    assert seen == [4] * 4 + [8] * 4 + [10] * 2


def test_a_burst_ends_where_what_was_read_leaves_no_room() -> None:
    large: list[int] = []
    items = read_ahead(range(50), large.append, 2, lambda waiting: not large, bursts=True)
    next(items)
    assert len(large) <= 5  # four of them, whose size nobody knew, beside the one that ended
    items.close()


def test_no_thread_stays_where_the_rest_is_not_wanted() -> None:
    before = threading.active_count()
    items = read_ahead(range(100), lambda item: item, 4, lambda waiting: waiting < 8)
    next(items)
    assert threading.active_count() > before
    items.close()
    assert threading.active_count() == before


def test_items_of_one_size_go_together() -> None:
    sizes = {"a": 1, "b": 2, "c": None, "d": 1, "e": 1, "f": 2, "g": 1}
    assert list(in_batches("abcdefg", sizes.__getitem__, 3)) == [["c"], ["a", "d", "e"], ["b", "f"], ["g"]]
    assert list(in_batches("abc", sizes.__getitem__, 1)) == [["a"], ["b"], ["c"]]


def test_few_batches_are_open_at_once() -> None:
    waiting = 0

    def items() -> object:
        nonlocal waiting
        for item in range(50):
            waiting += 1
            assert waiting < 8
            yield item

    for batch in in_batches(items(), lambda item: item, 4):  # type: ignore[arg-type,return-value]
        waiting -= len(batch)
    assert waiting == 0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_a_batch_that_needs_too_much_memory_is_halved(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = windowed(), []
    images = torch.randn(5, 3, 32, 32)
    expected, real = model.segment(images), model.segment

    def segment(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        if len(batch) > most:
            raise error
        return real(batch)

    monkeypatch.setattr(model, "segment", segment)
    most = 2
    assert torch.equal(segment_images(model, images.split(1)), expected)
    assert sizes == [5, 2, 3, 1, 2]
    most = 0
    with pytest.raises(type(error)):
        segment_images(model, images.split(1))


def test_a_model_is_left_in_its_modes() -> None:
    model = windowed().train()
    model.encoder.norm.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.encoder.norm.training
