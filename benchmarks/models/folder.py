"""The whole job of ``predict``: photographs on disk to labels on disk, against ``segment`` alone on the same images.

The photographs are views of one photograph, as JPEG files in a temporary folder; the model has random weights. The
variants take turns, a part of the photographs each time; "gain" in the tables is the share of the speed of ``segment``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmenter_fast import create_model
from segmenter_fast.devices import choose_dtype
from segmenter_fast.inference.batches import Model
from segmenter_fast.inference.folders import Job, plan
from segmenter_fast.inference.pipeline import run_all
from segmenter_fast.inference.resume import describe_run
from segmenter_fast.inference.settings import Settings
from segmenter_fast.io.images import normalise, read_image

from ..case import OURS, Row
from ..results import RESULTS
from ..runner import Runner
from ..timing import Timing
from .peers import PHOTOGRAPH, ModelCase

SIDE, PARTS = 512, 5
SEGMENT, LABELS, OVERLAYS = (f"{OURS} {what}" for what in ("segment", "files to labels", "files to both"))


def run_folder(
    variants: Sequence[str], photographs: int, batch: int, dtype: str, device: torch.device, out: Path = RESULTS
) -> int:
    """Measure the job with each variant of the model and write ``folder.json``.

    Returns:
        The number of models of which a file had other labels than ``segment``.

    Raises:
        ValueError: an unknown variant or dtype.
    """
    kind = choose_dtype(dtype, device)
    runner = Runner.start(device, [torch.float32, kind], out, False, 0.0)
    result = runner.result("folder")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_photographs(Path(folder, "in"), photographs)
        for case in (ModelCase(variant, kind, SIDE, batch, compile=False) for variant in variants):
            torch.manual_seed(0)
            model = create_model(case.variant, num_classes=case.classes, image_size=SIDE).to(device).eval()
            rows = measure_job(model.optimize(kind, compile=False), Path(folder), batch)
            result.refused += [f"{case.variant}: {row.note}" for row in rows[:1] if row.status == "refused"]
            parameters = {**case.parameters, "photographs": photographs}
            runner.keep(result, parameters, rows, f"{case.variant}, {photographs} photographs, batch {batch}")
    return len(result.refused)


def write_photographs(folder: Path, count: int) -> None:
    """Write ``count`` square views of a photograph as JPEG files, ``SIDE`` pixels a side."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with Image.open(PHOTOGRAPH) as photograph:
        for index in range(count):
            side = int(generator.integers(min(photograph.size) // 2, min(photograph.size)))
            left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
            view = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            view.save(folder / f"{index:05}.jpg", quality=90)


def measure_job(model: Model, folder: Path, batch: int) -> list[Row]:
    """Return the time per image of the three variants, or refuse them where a file has wrong labels."""
    jobs = {name: plan([folder / "in"], folder / "out", name == OVERLAYS) for name in (LABELS, OVERLAYS)}
    settings, config = Settings.of(model.config, batch_size=batch), model.config
    samples: dict[str, list[float]] = {name: [] for name in (SEGMENT, LABELS, OVERLAYS)}
    run = describe_run(model, settings)
    for part in (0, *range(PARTS)):  # the first one once more, to warm up
        part_of = {name: of[part::PARTS] for name, of in jobs.items()}
        pixels = [read_image(job.source) for job in part_of[LABELS]]
        images = torch.cat([normalise(x, config.mean, config.std, next(model.parameters()).device) for x in pixels])
        calls: dict[str, Callable[[], object]] = {SEGMENT: partial(_segment, model, images, batch)}
        write = partial(run_all, model, run=run)
        calls |= {name: partial(write, of, settings, lambda job: None, _end) for name, of in part_of.items()}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e3 / len(images))
        for job, labels in zip(part_of[LABELS], _segment(model, images, batch), strict=True):
            if not np.array_equal(read_labels(job.labels), labels):
                return [Row(name, "refused", f"{job.labels.name} has other labels than segment") for name in samples]
    rows = []
    for name, found in samples.items():
        median, p20, p80 = (float(p) for p in np.percentile(found[1:], (50, 20, 80)))
        timing = Timing(median, p20, p80, PARTS, 1, len(jobs[LABELS]), "perf_counter", None)
        rows.append(Row(name, "ok", error=0.0).timed(timing, images=1))
    return rows


def read_labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _segment(model: Model, images: Tensor, batch: int) -> np.ndarray:
    return torch.cat([model.segment(few) for few in images.split(batch)]).cpu().numpy()


def _end(job: Job, restarted: str | None, error: Exception | None) -> None:
    if error is not None:
        raise error
