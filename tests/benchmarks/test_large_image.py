"""``segmenter-fast predict`` on an image larger than memory should hold: its memory, its speed and its labels.

The slow case is the one of ``benchmarks/results/*/large_image.json``: 20,000 x 20,000 pixels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from segmenter_fast import Segmenter, create_model, load
from segmenter_fast.inference.windows import Windows
from segmenter_fast.io.images import normalise
from segmenter_fast.io.large_images import TiffRaster

TILE = 512
PERIOD = 4


def make_image(path: Path, side: int) -> None:
    """A ``side`` x ``side`` tiled RGB TIFF of waves and grain, which repeats after ``PERIOD`` tiles each way."""
    generator = np.random.default_rng(0)
    waves = generator.integers(1, 40, (2, 3)) * 2 * np.pi / (PERIOD * TILE)
    places = np.arange(PERIOD * TILE).reshape(PERIOD, TILE)
    tiles = []
    for rows in places:
        for columns in places:
            smooth = np.sin(rows[:, None, None] * waves[0] + np.cos(columns[:, None] * waves[1]) * 3) * 90 + 128
            grain = generator.integers(-20, 20, (TILE, TILE, 1))
            tiles.append(zlib.compress((smooth + grain).clip(0, 255).astype(np.uint8), level=1))
    across = range(-(-side // TILE))
    with tifffile.TiffWriter(path, bigtiff=3 * side * side > 1 << 31) as file:
        file.write(
            (tiles[y % PERIOD * PERIOD + x % PERIOD] for y in across for x in across),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="rgb",
            compression="zlib",
        )


def test_the_image_is_tiled_and_has_structure(tmp_path: Path) -> None:
    make_image(tmp_path / "x.tif", 2100)
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        page = file.pages[0]
        assert page.is_tiled
        assert page.shape == (2100, 2100, 3)
        pixels = page.asarray()
    assert pixels.std() > 30
    steps = abs(np.diff(pixels.astype(int), axis=0)).mean((1, 2))
    assert steps[[511, 1023, 2047]].max() < 1.3 * steps.mean()  # no edges where tiles meet
    assert np.array_equal(pixels[2048:], pixels[:52])


@torch.inference_mode()
def equal_labels(
    model: Segmenter, image: Path, labels: Path, anchors: Sequence[int], window: int, overlap: int
) -> float:
    """Share of equal labels between a few windows and the whole image, where no other window covers it."""
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


@pytest.mark.parametrize(
    ("side", "window", "overlap", "variant", "classes", "limit"),
    [
        pytest.param(400, 64, 16, "seg_t_mask_32", 7, 3e9, id="small"),
        pytest.param(20_000, 512, 32, "seg_t_mask_32", 19, 3e9, id="large", marks=pytest.mark.slow),
    ],
)
def test_a_large_image_is_segmented_in_little_memory(
    side: int, window: int, overlap: int, variant: str, classes: int, limit: float, tmp_path: Path
) -> None:
    model = create_model(variant, image_size=window, num_classes=classes)
    model.save_pretrained(tmp_path / "model")
    image, out = tmp_path / "image.tif", tmp_path / "out"
    make_image(image, side)
    command = [sys.executable, "-m", "segmenter_fast.cli", "predict", str(image), "--model", str(tmp_path / "model")]
    command += ["--out", str(out), "--window", str(window), "--overlap", str(overlap), "--format", "tiff"]
    with open(tmp_path / "messages", "w+") as messages:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"], stdout=messages, stderr=messages
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        messages.seek(0)
        assert process.returncode == 0, messages.read()[-2000:]
    axis = Windows.make(side, window, window - overlap, model.config.patch_size, True)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{seconds:.0f} s, {len(axis.anchors) ** 2 / seconds:.1f} windows/s, peak resident memory {peak / 1e9:.2f} GB"
    )
    assert 1e8 < peak < limit
    # Labels at rounding ties may differ between a batch and a single window.
    labels = out / "labels" / "image.tif"
    plain = load(tmp_path / "model").eval()
    assert equal_labels(plain, image, labels, axis.anchors, window, overlap) >= 0.998
