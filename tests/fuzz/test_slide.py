"""Random images, windows, overlaps, scales and bands, against the plain canvas; ``FUZZ_CASES=10000`` for long."""

from __future__ import annotations

import collections
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.inference import slide
from segmenter_fast.inference.rows import Rows
from segmenter_fast.inference.settings import Settings
from segmenter_fast.inference.sliding import slide_rows
from support.accuracy import largest_shortfall
from support.canvas import canvas_logits, scaled_and_flipped

CASES = int(os.environ.get("FUZZ_CASES", "100"))
Model = Callable[[Tensor], Tensor]


def pixels(images: Tensor) -> Tensor:
    """Logits of four classes that depend on the place in the window and on neighbours."""
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(images)
    return F.conv2d(images, weight, padding=1) * torch.linspace(0, 2, images.shape[3], dtype=images.dtype)


def segmenters() -> dict[str, Any]:
    """Small models of all rules of upsampling and enlarging, in float64."""
    models: dict[str, Any] = {"pixels": pixels}
    torch.manual_seed(0)
    for upsample_to in ("padded", "image"):
        for enlarges in (True, False):
            fields = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 1, "depth": 1, "num_classes": 3}
            fields |= {"upsample_to": upsample_to, "upscale_small_images": enlarges}
            model = sf.create_model("seg_t_linear_16", decoder_num_heads=1, **fields)
            models[f"{upsample_to}{', enlarges' if enlarges else ''}"] = model.double().eval()
    return models


def check(name: str, model: Model, draw: random.Random) -> str:
    """Labels and probabilities, whole and by bands from a random row on, are the canvas's."""
    size = draw.choice([(draw.randrange(1, 40), draw.randrange(1, 40)), (1, draw.randrange(1, 90)), (50, 3)])
    window = draw.randrange(4, 33)
    stride = draw.randrange(max(1, window // 3), window + 1)
    scales = draw.choice([[1.0], [1.0], [draw.uniform(0.5, 2)], [0.5, 1.0, 1.7]])
    scales = [scale if min(size) * scale >= 1 else 1.0 for scale in scales]
    flip, enlarges = draw.random() < 0.3, name == "pixels" or name.endswith("enlarges")
    if enlarges and max(size) / min(size) > 20:
        size = (size[0] + 8, size[1] + 8)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    views, flips = scaled_and_flipped(image, scales, flip)
    settings = Settings(window, stride, batch_size=draw.randrange(1, 6))
    with torch.inference_mode():
        rows = [Rows.of_tensor(view).enlarged(window) if enlarges else Rows.of_tensor(view) for view in views]
        logits = canvas_logits(model, [row.read(0, row.height) for row in rows], flips, size, window, stride)
        expected = logits.softmax(1).mean(0)
        votes = logits[0] if len(views) == 1 else expected
        output = draw.choice(["labels", "probabilities"])
        arguments = (size, window, stride, settings.batch_size, output)
        whole = slide(model, views, flips, *arguments)
        start, band = draw.randrange(size[0]), draw.choice([None, 1, draw.randrange(1, 30)])
        parts = [part for _, part in slide_rows(model, rows, flips, size, settings, output, band=band, start=start)]
    assert torch.equal(torch.cat(parts, -2), whole[..., start:, :]), f"rows from {start} on differ from the whole"
    if output == "labels":
        assert largest_shortfall(whole, votes, 0) <= 1e-9 * max(1.0, votes.abs().max().item())
    else:
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-9)
    several = "several views" if len(views) > 1 else "one view"
    return f"{name}, {several}, {output}"


def refused(draw: random.Random) -> str:
    """Arguments out of range: one ValueError or TypeError."""
    image = torch.randn(1, 3, draw.randrange(1, 20), draw.randrange(1, 20))
    wrong = {
        "window": {"window": draw.choice([0, -5])},
        "stride": {"stride": draw.choice([0, -1, 17])},
        "batch_size": {"batch_size": 0},
        "output": {"output": "masks"},
        "flips": {"flips": [False, True]},
        "size": {"size": draw.choice([(0, 3), (5,), (-1, -1)])},
        "image": {"images": [draw.choice([image[0], image.int(), image[:, :, :0], image * float("nan")])]},
        "no image": {"images": [], "flips": []},
        "work": {"images": [image[:, :, :1]], "window": 1 << 20, "stride": 1 << 20},
    }
    name = draw.choice(list(wrong))
    given = {"images": [image], "flips": [False], "size": tuple(image.shape[2:]), "window": 16, "stride": 16}
    with pytest.raises((ValueError, TypeError)):
        slide(pixels, **{**given, **wrong[name]})
    return f"refused: {name}"


def test_every_image_equals_the_canvas(capsys: pytest.CaptureFixture[str]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    wrong, start, models = [], time.perf_counter(), segmenters()
    for case in range(CASES):
        torch.manual_seed(case)
        draw = random.Random(case)
        name = list(models)[case % len(models)]
        try:
            counts[check(name, models[name], draw) if case % 10 else refused(draw)] += 1
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"case {case}, {name}: {type(error).__name__}: {str(error)[:200]}")
    with capsys.disabled():
        found = "".join(f"\n  {name}: {count}" for name, count in sorted(counts.items()))
        print(f"\n{CASES} images in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong{found}")
    assert not wrong, "\n".join(wrong[:20])
    assert len(counts) > 2 * len(models)
