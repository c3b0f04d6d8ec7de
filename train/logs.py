"""What a training run tells while it runs: a progress display, ``log.jsonl``, TensorBoard, pictures.

``log.jsonl`` in the run's folder holds one object a line, flushed line by line; ``kind`` says what it is:

    step        step, loss (null where not finite), lr, images_per_s, memory_bytes, eta_s
    evaluation  step, miou, macc, aacc, iou and accuracy for each class, pixels
    any other   step, message: an event
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from segmenter_fast.io.atomic import atomic_path, write_png

from .metrics import Scores

LOG = "log.jsonl"
SAMPLES = "samples"
TENSORBOARD = "tensorboard"


class RunLog:
    """The log of one run. Rank 0 gives the run's folder; the others None, and nothing is written or shown by them.

    A context manager: the display is up inside. A terminal gets a live line, anything else plain lines.

    Args:
        folder: of the run; made where it is missing.
        total_steps: of the whole run, for the display.
        resumed_step: the step that a resumed run goes on from. What an earlier process logged up to it stays; what it
            logged beyond, and the half line that a killed process leaves, is dropped. 0: the log begins anew.
        console: where the display goes, by default standard error.
        plain_seconds: least time between two plain lines of steps; 0 shows all.

    Raises:
        OSError: the folder or a file in it cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        resumed_step: int = 0,
        console: Console | None = None,
        plain_seconds: float = 5.0,
    ) -> None:
        self.folder, self.total_steps, self.plain_seconds = folder, total_steps, plain_seconds
        self.last_step = resumed_step
        self._said = -math.inf
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(folder) if record["step"] <= resumed_step] if resumed_step else []
        _rewrite(folder / LOG, kept)
        self._file = (folder / LOG).open("a", encoding="utf-8")
        self._board = _summary_writer(folder / TENSORBOARD, resumed_step + 1)
        self._console = console or Console(stderr=True)
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}")
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("", total=total_steps, completed=resumed_step)

    def __enter__(self) -> RunLog:
        if self.folder is not None:
            self._progress.start()
            if self._board is None:
                self.event("note", "TensorBoard gets nothing: pip install 'segmenter-fast[train]' for it")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Takes the display down and closes the files; may be called again."""
        if self.folder is not None:
            self._progress.stop()
            self._file.close()
            if self._board is not None:
                self._board.close()

    def step(
        self, step: int, loss: float, lr: float, images_per_s: float, memory_bytes: int | None, eta_s: float
    ) -> None:
        """One optimiser step, or the mean of those since the last call. ``step`` counts from 1.

        Args:
            memory_bytes: the device's or process's peak; None where nothing can tell.
            eta_s: seconds until the run ends.
        """
        self.last_step = step
        if self.folder is None:
            return
        numbers = {"loss": loss, "lr": lr, "images_per_s": images_per_s, "memory_bytes": memory_bytes, "eta_s": eta_s}
        self._write("step", **numbers)
        for name, value in numbers.items():
            if value is not None:
                self._scalar(f"train/{name}", value)
        memory = f", {memory_bytes / 2**30:.2f} GiB" if memory_bytes is not None else ""
        text = f"loss {loss:.4f}, lr {lr:.2e}, {images_per_s:.1f} images/s{memory}, {_duration(eta_s)} left"
        self._progress.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and self._due(step):
            self._say(f"step {step}/{self.total_steps}: {text}")

    def evaluation(self, step: int, scores: Scores) -> None:
        """What the model reaches after ``step`` steps."""
        self.last_step = step
        if self.folder is None:
            return
        self._write("evaluation", **scores.to_dict())
        for name in ("miou", "macc", "aacc"):
            self._scalar(f"evaluation/{name}", getattr(scores, name))
        self._say(f"step {step}: mIoU {scores.miou:.4f}, mAcc {scores.macc:.4f}, aAcc {scores.aacc:.4f}")

    def event(self, kind: str, message: str) -> None:
        """Something worth a line, such as a skipped step, a checkpoint or a broken image.

        Raises:
            ValueError: a kind that the other records have.
        """
        if kind in ("step", "evaluation"):
            raise ValueError(f"kind must be a word for the event, and not {kind!r}, which has a method of its own")
        if self.folder is None:
            return
        self._write(kind, message=message)
        if self._board is not None:
            self._board.add_text(kind, message, self.last_step)
        self._say(f"{kind}: {message}")

    def samples(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Pictures by name, such as those of ``evaluation.sample_pictures``: ``samples/<step>/<name>.png``.

        Raises:
            OSError: a file cannot be written.
        """
        if self.folder is None:
            return
        for name, image in images.items():
            write_png(image, self.folder / SAMPLES / f"{step:07}" / f"{_file_name(name)}.png")
            if self._board is not None:
                self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def _write(self, kind: str, **fields: Any) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        record = {"kind": kind, "step": self.last_step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def _scalar(self, name: str, value: float) -> None:
        if self._board is not None:
            self._board.add_scalar(name, value, self.last_step)

    def _due(self, step: int) -> bool:
        now = time.monotonic()
        if now - self._said < self.plain_seconds and step != self.total_steps:
            return False
        self._said = now
        return True

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run's folder or of its ``log.jsonl``, in order; none where there is no such file.

    A last line that its process did not finish is left out.

    Raises:
        ValueError: another line is no record, naming the file and the line.
    """
    path = run / LOG if run.is_dir() else run
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return list(_records(path, lines))


def _records(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            return  # empty after the last newline, or unfinished
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise ValueError(f"{path} must hold one record with kind and step a line; line {number} is none")
        yield record


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _summary_writer(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer, which hides what was logged from ``purge_step`` on; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _file_name(name: str) -> str:
    """A sample's name, which may be a path, as one file name."""
    return "".join(character if character.isalnum() or character in "-_." else "_" for character in name).strip(".")
