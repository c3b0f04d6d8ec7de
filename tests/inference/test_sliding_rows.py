"""``slide_rows`` against the canvas in float64, and its start, progress, reads and memory."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.inference.rows import Rows
from segmenter_fast.inference.settings import Settings
from segmenter_fast.inference.sliding import slide, slide_rows
from support.canvas import canvas_logits, scaled_and_flipped


class Toy:
    """A fast model of any dtype with patch-level masks that depend on the place in the window."""

    def __init__(self, patch: int = 4, upsample_to: str = "padded", classes: int = 5) -> None:
        self.config = SimpleNamespace(patch_size=patch, upsample_to=upsample_to, upscale_small_images=False)
        self.weight = torch.randn(classes, 3, generator=torch.Generator().manual_seed(1)) * 3
        self.batches: list[int] = []

    def masks(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        patch = self.config.patch_size
        height, width = images.shape[2:]
        images = F.avg_pool2d(F.pad(images, (0, -width % patch, 0, -height % patch)), patch)
        ramp = torch.linspace(-1, 1, images.shape[3], dtype=images.dtype)
        return torch.einsum("kc,bchw->bkhw", self.weight.to(images), images) * (1 + ramp) + ramp

    def __call__(self, images: Tensor) -> Tensor:
        masks, (height, width) = self.masks(images), images.shape[2:]
        size = height, width
        if self.config.upsample_to == "padded":
            size = masks.shape[2] * self.config.patch_size, masks.shape[3] * self.config.patch_size
        return F.interpolate(masks, size=size, mode="bilinear")[..., :height, :width]


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    window=st.integers(1, 40),
    stride=st.integers(4, 40),
    patch=st.sampled_from([2, 4, 16]),
    upsample_to=st.sampled_from(["padded", "image"]),
    scales=st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.3, 2.0]), min_size=1, max_size=2),
    flip=st.booleans(),
    band=st.integers(1, 70),
    batch_size=st.integers(1, 5),
)
def test_any_size_equals_the_canvas(
    height: int,
    width: int,
    window: int,
    stride: int,
    patch: int,
    upsample_to: str,
    scales: list[float],
    flip: bool,
    band: int,
    batch_size: int,
) -> None:
    scales = [scale if min(height, width) * scale >= 1 else 1.0 for scale in scales]
    window, stride = window + 4, min(stride, window + 4)
    model = Toy(patch, upsample_to)
    images, flips = scaled_and_flipped(torch.randn(1, 3, height, width, dtype=torch.float64), scales, flip)
    logits = canvas_logits(model, images, flips, (height, width), window, stride)
    votes = logits[0] if len(images) == 1 else logits.softmax(1).mean(0)
    rows = [Rows.of_tensor(image) for image in images]
    chosen = Settings(window, stride, batch_size=batch_size)
    for output in ("labels", "probabilities"):
        bands = list(slide_rows(model, rows, flips, (height, width), chosen, output, band=band))
        assert [top for top, _ in bands] == list(range(0, height, band))
        whole = torch.cat([part for _, part in bands], -2)
        if output == "probabilities":
            torch.testing.assert_close(whole, logits.softmax(1).mean(0), rtol=0, atol=1e-9)
        else:
            taken = votes.gather(0, whole[None].long())[0]
            assert (votes.amax(0) - taken).max() <= 1e-9 * max(1.0, votes.abs().max().item())


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (5, 700), (700, 5)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size)
    expected = canvas_logits(Toy(), [image.double()], [False], size, 32, 24)[0].softmax(0)
    ours = slide(Toy(), [image], [False], size, 32, 24, output="probabilities")
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.5)])
@pytest.mark.parametrize("start", [1, 47, 100, 149])
def test_a_resumed_run_equals_a_whole_one_to_the_bit(start: int, scales: tuple[float, ...]) -> None:
    model = sf.create_model("seg_t_mask_16", image_size=32, depth=1, num_classes=7).eval()
    images, flips = scaled_and_flipped(torch.randn(1, 3, 150, 90), scales, flip=len(scales) > 1)
    rows = [Rows.of_tensor(image) for image in images]
    arguments = (model, rows, flips, (150, 90), Settings(64, 48, batch_size=4))
    whole = torch.cat([part for _, part in slide_rows(*arguments)])
    tops, parts = zip(*slide_rows(*arguments, start=start, band=20), strict=True)
    assert tops == tuple(range(start, 150, 20))
    assert torch.equal(torch.cat(parts), whole[start:])


def test_only_needed_windows_are_scored_and_held() -> None:
    calls: list[tuple[int, int]] = []
    model = Toy()
    rows = [Rows.of_tensor(torch.randn(1, 3, 400, 100))]
    arguments = (model, rows, [False], (400, 100), Settings(40, 40))
    list(slide_rows(*arguments, progress=lambda completed, total: calls.append((completed, total))))
    assert sum(model.batches) == 30
    assert calls == [(done, 30) for done in range(2, 31, 2)]
    calls.clear()
    model.batches.clear()
    list(slide_rows(*arguments, start=365, progress=lambda completed, total: calls.append((completed, total))))
    assert sum(model.batches) == 4  # the last row of windows, and the one that shares its first batch
    assert calls == [(26, 30), (28, 30), (30, 30)]


class Recorder:
    """Rows that record what was read of them."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.reads: list[tuple[int, int]] = []

    def read(self, top: int, bottom: int) -> Tensor:
        self.reads.append((top, bottom))
        generator = torch.Generator().manual_seed(top)
        return torch.randn(1, 3, bottom - top, self.width, generator=generator)


def test_each_row_of_windows_is_read_once() -> None:
    image = Recorder(200, 300)
    for _ in slide_rows(Toy(), [image], [False], (200, 300), Settings(64, 48, batch_size=3), band=7):
        pass
    assert image.reads == [(0, 64), (48, 112), (96, 160), (136, 200)]


def test_low_precision_masks_are_averaged_in_float32() -> None:
    image = torch.randn(1, 3, 50, 70)
    model = Toy()
    masks = model.masks
    model.masks = lambda crops: masks(crops.bfloat16())
    low = slide(model, [image], [False], (50, 70), 24, 5, output="probabilities")
    assert low.dtype == torch.float32
    model.masks = lambda crops: masks(crops.bfloat16()).double()  # the same masks, averaged in float64
    high = slide(model, [image], [False], (50, 70), 24, 5, output="probabilities")
    torch.testing.assert_close(low.double(), high, rtol=0, atol=2e-6)


@pytest.mark.parametrize("upsample_to", ["padded", "image"])
def test_the_inference_form_gives_the_canvas_of_its_logits(upsample_to: str) -> None:
    model = sf.create_model("seg_t_mask_16", image_size=64, depth=1, num_classes=9, upsample_to=upsample_to).eval()
    fast = model.optimize(torch.float32, compile=False)
    image = torch.randn(1, 3, 100, 150)
    expected = canvas_logits(fast, [image], [False], (100, 150), 60, 44)[0].softmax(0)
    ours = slide(fast, [image], [False], (100, 150), 60, 44, output="probabilities")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 8}, "start must be a row of the 8 of the result, got 8"),
        ({"start": -1}, "start must be a row"),
        ({"band": 0}, "band must be at least 1 row, got 0"),
        ({"flips": []}, "flips must have one entry for each of the 1 images, got 0"),
        ({"images": [], "flips": []}, "images must hold at least one image, got none"),
        ({"output": "logits"}, "output must be one of labels, probabilities, got 'logits'"),
        ({"model": SimpleNamespace(config=Toy().config, masks=lambda x: x)}, r"model must give masks \(1, K, 2, 2\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    images = [Rows.of_tensor(torch.zeros(1, 3, 8, 8))]
    arguments = {"model": Toy(), "images": images, "flips": [False], "size": (8, 8), "settings": Settings(8, 8)}
    with pytest.raises(ValueError, match=message):
        list(slide_rows(**{**arguments, **change}))


MEMORY = """
import sys
import torch
from segmenter_fast.benchmarks.timing import peak_memory
from segmenter_fast.inference import slide

sys.path[:0] = ["tests", "tests/inference"]
from test_sliding_rows import Toy

torch.set_num_threads(1)
model, image = Toy(16, classes=150), torch.randn(1, 3, 2048, 2048)
slide(model, [image[..., :520, :520]], [False], (520, 520), 512, 480)
print(peak_memory(lambda: slide(model, [image], [False], (2048, 2048), 512, 480), torch.device("cpu")))
"""


def test_memory_is_far_below_the_canvas() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 2048 * 2048 * 150 * 4 / 10
