"""The run's log: files, display, resuming."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from segmenter_fast.train.evaluation import ConfusionMatrix, Scores
from segmenter_fast.train.logs import LOG, SAMPLES, TENSORBOARD, RunLog, read_log

LR = 1e-3


def scores() -> Scores:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
    return matrix.scores()


def opened(folder: Path | None, **options: object) -> tuple[RunLog, io.StringIO]:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=bool(options.pop("terminal", False)), width=200)
    return RunLog(folder, total_steps=10, batch_size=24, console=console, **{"plain_seconds": 0.0, **options}), shown


class Clock:
    """``time`` of the log, whose perf_counter is set by the test."""

    monotonic, time = staticmethod(time.monotonic), staticmethod(time.time)

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("segmenter_fast.train.logs.time", clock)
    return clock


def test_everything_is_recorded_and_shown(tmp_path: Path) -> None:
    log, shown = opened(tmp_path / "run")
    with log:
        log.step(1, 2.5, LR)
        assert len(read_log(tmp_path / "run")) == 1  # flushed while the run goes on
        log.evaluation(1, scores())
        log.event("skipped", "step 2: the loss is not finite [x]")
        log.step(2, float("nan"), LR)
        log.samples(2, {"a/b.jpg": Image.new("RGB", (4, 4), "red")})
    records = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("step", 1), ("evaluation", 1), ("skipped", 1), ("step", 2),
    ]  # fmt: skip
    assert (records[0]["loss"], records[0]["lr"], records[0]["memory_bytes"]) == (2.5, LR, None)
    assert records[1]["iou"] == [0.5, 0.0, None]
    assert records[3]["loss"] is None
    for text in ("step 1/10: loss 2.5000, lr 1.00e-03, ", "mIoU 0.2500", "[x]"):
        assert text in shown.getvalue()
    with Image.open(tmp_path / "run" / SAMPLES / "0000002" / "a_b.jpg.png") as picture:
        assert picture.size == (4, 4)


def test_speed_and_loss_are_means_since_the_last_record(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    log, shown = opened(tmp_path, device=torch.device("cuda"))
    with log:
        for step, loss in ((1, 1.0), (2, float("nan")), (3, 3.0), (4, 5.0)):
            clock.seconds += 621
            log.step(step, loss, LR, write=step in (3, 4))
            with log.paused():
                clock.seconds += 1000
    first, second = read_log(tmp_path)
    wanted = {"step": 3, "loss": 2.0, "images_per_s": 24 / 621, "eta_s": 7 * 621, "memory_bytes": 2**30}
    assert {name: first[name] for name in wanted} == pytest.approx(wanted)
    assert (second["step"], second["loss"], second["images_per_s"]) == (4, 5.0, pytest.approx(24 / 621))
    assert "step 4/10: loss 5.0000, lr 1.00e-03, 0.0 images/s, 1.00 GiB, 1:02:06 left" in shown.getvalue()


def test_tensorboard_gets_scalars_and_images(tmp_path: Path) -> None:
    log, _ = opened(tmp_path)
    with log:
        log.step(1, 2.5, LR)
        log.evaluation(1, scores())
        log.samples(1, {"first": Image.new("RGB", (4, 4))})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert events.Scalars("evaluation/miou")[0].value == 0.25
    assert events.Tags()["images"] == ["first"]


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    log, shown = opened(tmp_path, terminal=True)
    with log:
        log.step(3, 2.5, LR)
        log._progress.refresh()
    assert "3/10" in shown.getvalue()
    assert "loss 2.5000" in shown.getvalue()
    assert "step 3/10:" not in shown.getvalue()


def test_plain_lines_keep_a_distance(tmp_path: Path) -> None:
    log, shown = opened(tmp_path, plain_seconds=3600)
    with log:
        for step in (1, 2, 3, 10):
            log.step(step, 1.0, LR)
    lines = [line.split(":")[0] for line in shown.getvalue().splitlines()]
    assert lines == ["step 1/10", "step 10/10"]


def test_a_resumed_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    log, _ = opened(tmp_path)
    with log:
        for step in (1, 2, 3, 4):
            log.step(step, float(step), LR)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"kind": "step", "st')  # killed in the middle of a line
    log, _ = opened(tmp_path, resumed_step=2)
    with log:
        log.event("resumed", "from step 2")
        log.step(3, 30.0, LR)
    found = [(record["kind"], record["step"], record.get("loss")) for record in read_log(tmp_path)]
    assert found == [("step", 1, 1.0), ("step", 2, 2.0), ("resumed", 2, None), ("step", 3, 30.0)]
    with opened(tmp_path)[0]:
        pass
    assert read_log(tmp_path) == []


def test_other_ranks_write_and_show_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log, shown = opened(None)
    with log:
        log.step(1, 2.5, LR)
        log.evaluation(1, scores())
        log.event("note", "x")
        log.samples(1, {"a": Image.new("RGB", (2, 2))})
    assert shown.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    log, shown = opened(tmp_path)
    with log:
        log.step(1, 2.5, LR)
        log.evaluation(1, scores())
    assert "TensorBoard gets nothing" in shown.getvalue()
    assert not (tmp_path / TENSORBOARD).exists()


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"kind": "step", "step": 1}\nnonsense\n{"kind": "step", "step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl .* line 2 is none"):
        read_log(tmp_path)


def test_events_take_no_name_of_other_records() -> None:
    with pytest.raises(ValueError, match="'step'"):
        RunLog(None, 1, 1).event("step", "x")
