"""The log of a training run: a progress display, ``log.jsonl``, TensorBoard, pictures.

``log.jsonl`` in the run's folder holds one object a line, flushed line by line, of one of these kinds:

    step        step, loss (null where not finite), lr, images_per_s, memory_bytes, eta_s
    evaluation  step, miou, macc, aacc, iou and accuracy for each class, pixels
    any other   step, message: an event
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..io.atomic import atomic_path, write_png
from .evaluation import Scores
from .ownership import record as record_files

LOG = "log.jsonl"
SAMPLES = "samples"
TENSORBOARD = "tensorboard"


class RunLog:
    """The log of one run. Rank 0 gives the run's folder; the others None, and then nothing is written or shown.

    A context manager: the display is up inside. A terminal gets a live line, anything else plain lines.

    Args:
        folder: of the run; made where it is missing.
        total_steps: of the whole run, for the display.
        batch_size: images of a step, in all processes.
        resumed_step: the step that a resumed run goes on from. Records up to it stay; later ones, and the half line
            that a killed process leaves, are dropped. 0: a new log.
        evaluated: the evaluation of that step is complete; else its record is dropped, too.
        device: its peak memory is logged if it is a GPU.
        console: where the display goes, by default standard error.
        plain_seconds: least time between two plain lines of steps; 0 shows all.

    Raises:
        OSError: the folder or a file in it cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        batch_size: int,
        resumed_step: int = 0,
        evaluated: bool = True,
        device: torch.device | None = None,
        console: Console | None = None,
        plain_seconds: float = 5.0,
    ) -> None:
        self.folder, self.total_steps, self.batch_size, self.device = folder, total_steps, batch_size, device
        self.plain_seconds, self.last_step = plain_seconds, resumed_step
        self._shown = -math.inf
        self._start, self._losses = time.perf_counter(), list[float]()  # since the last record of steps
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record_files(folder, LOG, f"{TENSORBOARD}/events.out.tfevents.*")
        if (folder / LOG).exists():
            kept = [record for record in read_log(folder) if record["step"] <= resumed_step] if resumed_step else []
            if not evaluated:
                kept = [each for each in kept if (each["kind"], each["step"]) != ("evaluation", resumed_step)]
            with atomic_path(folder / LOG) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = (folder / LOG).open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._tensorboard: Any = None
        else:  # hides what was logged from purge_step on
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=resumed_step + 1)
        self._console = console or Console(stderr=True)
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}")
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("", total=total_steps, completed=resumed_step)

    def __enter__(self) -> RunLog:
        if self.folder is not None:
            self._progress.start()
            if self._tensorboard is None:
                self.event("note", "TensorBoard gets nothing: pip install 'segmenter-fast[train]' for it")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.folder is not None:
            self._progress.stop()
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()

    def step(self, step: int, loss: float, lr: float, write: bool = True) -> None:
        """Count an optimizer step, from 1 on. With ``write``, record the steps since the last record.

        The record has the mean of their finite losses, NaN without one, and their speed.
        """
        self._losses.append(loss)
        if not write:
            return
        self.last_step = step
        seconds = (time.perf_counter() - self._start) / len(self._losses)
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        self._start, self._losses = time.perf_counter(), []
        if self.folder is None:
            return
        loss = sum(finite) / len(finite) if finite else math.nan
        speed, eta = self.batch_size / seconds, (self.total_steps - step) * seconds
        cuda = self.device is not None and self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if cuda else None
        numbers = {"loss": loss, "lr": lr, "images_per_s": speed, "memory_bytes": memory, "eta_s": eta}
        self._write("step", "train", numbers)
        size = f", {memory / 2**30:.2f} GiB" if memory is not None else ""
        minutes, rest = divmod(round(eta), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
        text = f"loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} images/s{size}, {left} left"
        self._progress.update(self._task, completed=step, description=text)
        due = time.monotonic() - self._shown >= self.plain_seconds or step == self.total_steps
        if due and not self._console.is_terminal:
            self._shown = time.monotonic()
            self._print(f"step {step}/{self.total_steps}: {text}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count as training."""
        pause = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause

    def evaluation(self, step: int, scores: Scores) -> None:
        """Record the scores of the model after ``step`` steps."""
        self.last_step = step
        if self.folder is not None:
            self._write("evaluation", "evaluation", asdict(scores))
            self._print(f"step {step}: mIoU {scores.miou:.4f}, mAcc {scores.macc:.4f}, aAcc {scores.aacc:.4f}")

    def event(self, kind: str, message: str) -> None:
        """Record an event, such as a skipped step, a checkpoint or a broken image.

        Raises:
            ValueError: a kind that the other records have.
        """
        if kind in ("step", "evaluation"):
            raise ValueError(f"kind must be a word for the event, and not {kind!r}, which has a method of its own")
        if self.folder is None:
            return
        self._write(kind, None, {"message": message})
        if self._tensorboard is not None:
            self._tensorboard.add_text(kind, message, self.last_step)
        self._print(f"{kind}: {message}")

    def samples(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Write pictures by name, such as those of ``evaluation.sample_pictures``: ``samples/<step>/<name>.png``.

        Raises:
            OSError: a file cannot be written.
        """
        if self.folder is None:
            return
        for name, image in images.items():
            # a sample's name may be a path
            file = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).strip(".")
            place = f"{SAMPLES}/{step:07}/{file}.png"
            record_files(self.folder, place)
            write_png(image, self.folder / place)
            if self._tensorboard is not None:
                self._tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def _write(self, kind: str, group: str | None, fields: dict[str, Any]) -> None:
        """Append a record to the file; numbers become TensorBoard's scalars where a group is given."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        record = {"kind": kind, "step": self.last_step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if group is not None and self._tensorboard is not None:
            for name, value in fields.items():
                if isinstance(value, (int, float)) and name != "pixels":
                    self._tensorboard.add_scalar(f"{group}/{name}", value, self.last_step)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's folder or of its ``log.jsonl``, in order; none where there is no such file.

    A last line that its process did not finish is left out.

    Raises:
        ValueError: another line is no record; names the file and the line.
    """
    path = run / LOG if run.is_dir() else run
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else [], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise ValueError(f"{path} must hold one record with kind and step a line; line {number} is none")
        records.append(record)
    return records
