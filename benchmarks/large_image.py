"""An image larger than memory should hold: 20,000 x 20,000 pixels through ``segmenter-fast predict``.

``python -m segmenter_fast.benchmarks.large_image [--side N] [--limit-gb G]`` makes a tiled TIFF, segments it in a
process of its own with a small model of random weights, and writes ``large_image.json``: seconds of the whole command
(start, decoding, model, writing labels and overlay), windows/s, and the process's peak resident memory. It is refused
where that passes the limit, or where labels differ from those of single windows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from segmenter_fast import Segmenter, create_model, load
from segmenter_fast.devices import choose_device, choose_dtype
from segmenter_fast.inference.windows import Windows
from segmenter_fast.io.images import normalise
from segmenter_fast.io.large_images import TiffRaster

from .device import describe
from .results import write_json

TILE = 512
_PERIOD = 4
# Labels at rounding ties may differ between a batch and a single window.
_AGREEMENT = 0.998


@dataclass(frozen=True)
class Run:
    """What one image took. ``agreement`` is the share of pixels of single windows with the labels they have alone."""

    variant: str
    classes: int
    dtype: str
    side: int
    window: int
    overlap: int
    windows: int
    seconds: float
    windows_per_s: float
    megapixels_per_s: float
    peak_resident_bytes: int
    image_bytes: int
    label_bytes: int
    agreement: float


def make_image(path: Path, side: int) -> None:
    """A ``side`` x ``side`` tiled RGB TIFF of waves and grain, which repeats after ``_PERIOD`` tiles each way."""
    generator = np.random.default_rng(0)
    waves = generator.integers(1, 40, (2, 3)) * 2 * np.pi / (_PERIOD * TILE)
    places = np.arange(_PERIOD * TILE).reshape(_PERIOD, TILE)
    tiles = []
    for rows in places:
        for columns in places:
            smooth = np.sin(rows[:, None, None] * waves[0] + np.cos(columns[:, None] * waves[1]) * 3) * 90 + 128
            grain = generator.integers(-20, 20, (TILE, TILE, 1))
            tiles.append(zlib.compress((smooth + grain).clip(0, 255).astype(np.uint8), level=1))
    across = range(-(-side // TILE))
    with tifffile.TiffWriter(path, bigtiff=3 * side * side > 1 << 31) as file:
        file.write(
            (tiles[y % _PERIOD * _PERIOD + x % _PERIOD] for y in across for x in across),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="rgb",
            compression="zlib",
        )


def measure(
    folder: Path, variant: str, side: int, window: int, overlap: int, device: str, dtype: str, **fields: Any
) -> Run:
    """Segments a new image below ``folder`` in a process of its own.

    Raises:
        RuntimeError: the command failed, with its messages.
    """
    torch.manual_seed(0)
    model = create_model(variant, image_size=window, **fields)
    model.save_pretrained(folder / "model")
    image, out = folder / "image.tif", folder / "out"
    make_image(image, side)
    options = {"model": folder / "model", "out": out, "device": device, "dtype": dtype, "format": "tiff"}
    options |= {"window": window, "overlap": overlap}
    command = [sys.executable, "-m", "segmenter_fast.cli", "predict", str(image)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with open(folder / "messages", "w+") as messages:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=messages, stderr=messages)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            raise RuntimeError(f"predict ended with exit code {process.returncode}: {messages.read()[-2000:]}")
    config = model.config
    axis = Windows.make(side, window, window - overlap, config.patch_size, config.upsample_to == "padded")
    labels = out / "labels" / "image.tif"
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    return Run(
        variant=variant,
        classes=config.num_classes,
        dtype=str(kind).removeprefix("torch."),
        side=side,
        window=window,
        overlap=overlap,
        windows=len(axis.anchors) ** 2,
        seconds=seconds,
        windows_per_s=len(axis.anchors) ** 2 / seconds,
        megapixels_per_s=side * side / seconds / 1e6,
        peak_resident_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        image_bytes=image.stat().st_size,
        label_bytes=labels.stat().st_size,
        agreement=_agreement(
            load(folder / "model").to(place, kind).eval(), image, labels, axis.anchors, window, overlap
        ),
    )


@torch.inference_mode()
def _agreement(model: Segmenter, image: Path, labels: Path, anchors: Sequence[int], window: int, overlap: int) -> float:
    """Over a few windows, the pixels that no other window covers: share with the labels of the window alone."""
    device, equal, count = next(model.parameters()).device, 0, 0
    pixels, found = TiffRaster(str(image)), tifffile.imread(labels)
    inner = slice(overlap, window - overlap)
    for index in sorted({0, len(anchors) // 3, len(anchors) // 2}):
        place = slice(anchors[index], anchors[index] + window)
        crop = normalise(pixels.read(place.start, place.stop)[:, place], model.config.mean, model.config.std, device)
        alone = model.segment(crop)[0].cpu().numpy()[inner, inner]
        equal += int((alone == found[place, place][inner, inner]).sum())
        count += alone.size
    return equal / count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.large_image", description=__doc__)
    parser.add_argument("--side", type=int, default=20_000, help="of the image in pixels")
    parser.add_argument("--variant", default="seg_t_mask_32")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=32)
    parser.add_argument("--limit-gb", type=float, default=3.0, help="of resident memory, in 10^9 bytes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--scratch", type=Path, help="folder for the image and its labels; default: a temporary one")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    options = parser.parse_args(arguments)
    if options.window > options.side or not 0 <= 2 * options.overlap < options.window:
        parser.error("the image must be at least a window, and the overlap below half of one")
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        run = measure(
            Path(folder),
            options.variant,
            options.side,
            options.window,
            options.overlap,
            options.device,
            options.dtype,
            num_classes=options.classes,
        )
    gigabytes = run.peak_resident_bytes / 1e9
    print(f"{run.side:,} x {run.side:,} pixels, {run.classes} classes, {run.variant} in {run.dtype}:")
    print(f"{run.seconds:.0f} s, {run.windows_per_s:.1f} windows/s, peak resident memory {gigabytes:.2f} GB")
    if run.agreement < _AGREEMENT:
        print(f"refused: {run.agreement:.2%} of the labels are those of the windows alone")
        return 1
    if gigabytes > options.limit_gb:
        print(f"refused: more than the limit of {options.limit_gb:g} GB")
        return 1
    record = describe(device)
    content = {"device": asdict(record), "limit_gb": options.limit_gb, "run": asdict(run)}
    print(write_json(content, options.out / record.slug / "large_image.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
