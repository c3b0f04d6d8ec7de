"""upsample_argmax against float64 interpolate + argmax: equal up to rounding; ties, NaN and infinities exactly."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels.bilinear import Axis
from segmenter_fast.kernels.registry import INTERPRET
from support.accuracy import largest_shortfall

from .conftest import Backend

# The interpreter runs on numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def backend(backend_or_pytorch: Backend) -> Backend:
    return backend_or_pytorch


def logits(masks: Tensor, size: tuple[int, int], crop: tuple[int, int] | None, align_corners: bool) -> Tensor:
    height, width = crop or size
    return F.interpolate(masks.double(), size=size, mode="bilinear", align_corners=align_corners)[..., :height, :width]


def check(
    masks: Tensor, size: tuple[int, int], crop: tuple[int, int] | None = None, align_corners: bool = False
) -> None:
    """The chosen class is the best one of the float64 oracle, or differs from it by less than float32 can tell."""
    labels = kernels.upsample_argmax(masks, size, crop, align_corners)
    assert labels.dtype == (torch.uint8 if masks.shape[1] <= 256 else torch.int32)
    assert labels.shape == (masks.shape[0], *(crop or size))
    assert labels.is_contiguous()
    if labels.numel() == 0:
        return
    assert labels.long().max() < masks.shape[1]
    eps = torch.finfo(torch.float64 if masks.dtype == torch.float64 else torch.float32).eps
    shortfall = largest_shortfall(labels, logits(masks, size, crop, align_corners), 1)
    assert shortfall <= 8 * eps * masks.abs().max().item(), f"{tuple(masks.shape)} -> {size}: worse by {shortfall:.3g}"


def smooth(*shape: int) -> Tensor:
    return F.interpolate(torch.randn(*shape[:2], 2, 2), size=shape[2:], mode="bicubic", align_corners=False)


MAPS = {"noise": torch.randn, "smooth": smooth, "zeros": torch.zeros}
RESIZES = [
    # masks, size, crop, align_corners
    ((2, 9, 2, 3), (32, 48), None, False),
    ((1, 7, 3, 3), (24, 24), (17, 9), False),
    ((1, 5, 4, 3), (13, 11), None, False),
    ((1, 40, 3, 2), (21, 9), (20, 5), True),
    ((1, 3, 7, 6), (3, 5), (3, 4), False),
    ((2, 3, 4, 5), (4, 5), None, True),
    ((1, 6, 1, 1), (5, 9), None, False),
    ((1, 6, 1, 4), (20, 33), None, True),
    ((1, 6, 4, 1), (1, 1), None, True),
    ((1, 4, 2, 2), (60, 60), (40, 60), False),
]


@pytest.mark.parametrize("resize", RESIZES, ids=str)
def test_equals_pytorch(backend, resize, poisoned) -> None:
    shape, *rest = resize
    for dtype in backend.dtypes:
        for draw in MAPS.values():
            check(draw(*shape).to(backend.device, dtype), *rest)


# The interpreter takes a tenth of a second for each example, a GPU half a second to build its kernel.
EXAMPLES = 12 if INTERPRET or torch.cuda.is_available() else 60
SIDES = st.integers(1, 4)
SIZES = st.integers(1, 25)


@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 3, 9, 33, 260]), SIDES, SIDES),
    size=st.tuples(SIZES, SIZES),
    crop=st.tuples(SIZES, SIZES),
    align_corners=st.booleans(),
    kind=st.sampled_from(sorted(MAPS)),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(backend, shape, size, crop, align_corners, kind) -> None:
    crop = (min(crop[0], size[0]), min(crop[1], size[1]))
    check(MAPS[kind](*shape).to(backend.device), size, crop, align_corners)


@pytest.mark.parametrize("num_classes", [1, 2, 256, 257, 1025])
def test_class_counts(backend, num_classes) -> None:
    masks = torch.randn(1, num_classes, 1, 1) + 0.1 * torch.randn(1, num_classes, 2, 2)
    masks = masks.to(backend.device)
    check(masks, (4, 6))
    # The last class wins everywhere: no label is cut off.
    masks[:, -1] = 10
    labels = kernels.upsample_argmax(masks, (4, 6))
    assert labels.unique().tolist() == [num_classes - 1]


def test_float64(backend) -> None:
    masks = torch.randn(1, 5, 3, 4, dtype=torch.float64, device=backend.device)
    # Two classes that only float64 tells apart.
    masks[:, 3] = 9
    masks[:, 1] = 9 + 1e-12
    assert kernels.upsample_argmax(masks, (24, 32)).unique().tolist() == [1]
    check(masks, (25, 31))


def test_any_strides(backend) -> None:
    size = (5, 7)
    whole = torch.randn(3, 6, 4, 6, device=backend.device)
    views = {
        "channels-last": whole.to(memory_format=torch.channels_last),
        "sliced": whole[::2, 1::2, ::3, 1::3],
        "transposed": whole.transpose(2, 3),
        "expanded": whole[:1, :, :1].expand(2, -1, 4, -1),
        "tokens": torch.randn(2, 12, 5, device=backend.device).mT.unflatten(2, (3, 4)),
    }
    for masks in views.values():
        check(masks, size)


def test_empty_batch(backend) -> None:
    check(torch.empty(0, 3, 4, 5, device=backend.device), (16, 20))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("scale", [1, 2, 8])
def test_ties_go_to_the_lowest_class(backend, scale, align_corners) -> None:
    # Small integers and dyadic weights: every product is exact, and ties are many.
    masks = torch.randint(-1, 2, (1, 12, 4, 4), device=backend.device).float()
    side = 3 * scale + 1 if align_corners else 4 * scale
    expected = logits(masks, (side, side), None, align_corners).argmax(1)
    for dtype in backend.dtypes:
        assert torch.equal(kernels.upsample_argmax(masks.to(dtype), (side, side), None, align_corners).long(), expected)


def test_equal_classes_tie_to_the_lowest(backend) -> None:
    masks = torch.randn(1, 1, 4, 4, device=backend.device).repeat(1, 20, 1, 1)
    masks[:, :3] -= 1
    assert kernels.upsample_argmax(masks, (30, 17)).unique().tolist() == [3]


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("side", "align_corners"), [(16, False), (13, True), (4, False), (4, True)])
def test_nan_and_infinity_as_in_pytorch(backend, special, side, align_corners) -> None:
    masks = torch.randint(-3, 4, (3, 6, 4, 4), device=backend.device).float()
    spots = torch.rand(masks.shape, device=backend.device) < 0.03
    spots[0] = False
    spots[1, :, 0, 0] = True
    masks[spots] = special
    # On a CPU: PyTorch's CUDA kernel copies where the size is the same, and makes no NaN of 0 * inf.
    full = F.interpolate(masks.cpu(), size=(side, side), mode="bilinear", align_corners=align_corners)
    labels = kernels.upsample_argmax(masks, (side, side), None, align_corners)
    assert torch.equal(labels.cpu().long(), full.argmax(1))


def test_mixed_nan_and_infinities(backend) -> None:
    masks = torch.randint(-3, 4, (4, 5, 4, 4), device=backend.device).float()
    draw = torch.rand(masks.shape, device=backend.device)
    for bound, special in ((0.06, torch.nan), (0.04, torch.inf), (0.02, -torch.inf)):
        masks[draw < bound] = special
    expected = F.interpolate(masks, size=(16, 16), mode="bilinear").argmax(1)
    assert torch.equal(kernels.upsample_argmax(masks, (16, 16)).long(), expected)


@pytest.mark.parametrize("factor", [3e38, 1e30, 1e-30, 1e-44])
def test_extreme_values(backend, factor) -> None:
    masks = (torch.rand(1, 9, 4, 4) * 2 - 1).mul(factor).to(backend.device)
    labels = kernels.upsample_argmax(masks, (32, 32))
    assert largest_shortfall(labels, logits(masks, (32, 32), None, False), 1) <= 1e-6 * factor + 1e-44


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_cells_in_which_classes_are_pruned(backend, kind, align_corners) -> None:
    shapes = [(24, 3, 7), (33, 4, 17), (150, 2, 33)] if not INTERPRET else [(33, 4, 5)]
    for (classes, height, width), scale in itertools.product(shapes, (3, 5.3, 16, 33)):
        size = round(height * scale), round(width * scale)
        for masks in (MAPS[kind](1, classes, height, width), MAPS[kind](1, classes, width, height).mT):
            check(masks.to(backend.device), size, (size[0] - 2, size[1] - 3), align_corners)


def test_threads_and_tiles_change_nothing(monkeypatch) -> None:
    masks = [draw(3, 40, 9, 11) for draw in (smooth, torch.randn)]
    sizes = [(100, 121), (20, 25), (5, 4)]

    def labels() -> list[Tensor]:
        return [kernels.upsample_argmax(scores, size) for scores, size in itertools.product(masks, sizes)]

    threads, whole = torch.get_num_threads(), labels()
    for count in (1, 3, 16):
        torch.set_num_threads(count)
        found = labels()
        torch.set_num_threads(threads)
        assert all(map(torch.equal, found, whole))
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    for limit in (1, 30000):
        for name in ("labels._TILE", "labels._CHUNK", "lattice._TILE"):
            monkeypatch.setattr(f"segmenter_fast.kernels.cpu.{name}", limit)
        assert all(map(torch.equal, labels(), whole))


@pytest.mark.interpret
def test_positions_beyond_32_bits() -> None:
    masks = torch.randn(1, 12, 1, 3)
    tall = masks.expand(-1, -1, 1 << 28, -1)  # all rows are alike
    labels = kernels.upsample_argmax(tall, ((1 << 29) + 1, 8), (5, 8))
    assert torch.equal(labels, kernels.upsample_argmax(masks, (5, 8)))


@pytest.mark.interpret
def test_logits_are_mixed_along_x_first() -> None:
    """With PyTorch's roundings: a class and its transpose tie where x = y, and the last bits decide."""
    masks = torch.rand(1, 4, 3, 3)
    masks = torch.cat([masks, masks.mT], 1)
    low, high, weight = Axis.make(3, 24).taps()
    weight = weight.float()
    rows = (1 - weight) * masks[..., low] + weight * masks[..., high]
    expected = (1 - weight)[:, None] * rows[:, :, low] + weight[:, None] * rows[:, :, high]
    assert torch.equal(kernels.upsample_argmax(masks, (24, 24)).long(), expected.argmax(1))


@pytest.mark.parametrize("axis", range(4), ids=["batch", "class", "row", "column"])
def test_addresses_are_64_bit(backend, axis) -> None:
    shape, strides = [2, 2, 2, 2], [1 << 12, 1 << 8, 1 << 4, 1]
    shape[axis], strides[axis] = 3, (1 << 30) + 4096  # fits 32 bits, twice as much does not
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    masks = backend.sparse_memory(last + 1).as_strided(shape, strides)
    check(masks.copy_(torch.randn(shape)), (8, 8))


MEMORY = """
import torch
from segmenter_fast import kernels
from segmenter_fast.benchmarks.timing import peak_memory

torch.set_num_threads(1)
grid = torch.nn.functional.interpolate(torch.randn(1, 150, 16, 16), size=(256, 256), mode="bilinear")
masks = grid.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
print(peak_memory(lambda: kernels.upsample_argmax(masks, (4096, 4096)), torch.device("cpu")))
"""


def test_more_than_2_to_the_31_logits_in_less_than_2_gb() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 2e9


def test_masks_that_require_gradients(backend) -> None:
    masks = torch.randn(1, 5, 4, 4, device=backend.device, requires_grad=True)
    labels = kernels.upsample_argmax(masks * 1, (16, 16))
    assert not labels.requires_grad
    check(masks.detach(), (16, 16))


@pytest.mark.parametrize(
    ("masks", "size", "crop", "error", "message"),
    [
        (torch.zeros(2, 7, 32), (8, 8), None, ValueError, r"masks must be \(B, K, h, w\), got \(2, 7, 32\)"),
        (torch.zeros(1, 2, 3, 3, dtype=torch.int32), (8, 8), None, TypeError, "torch.int32"),
        (torch.zeros(1, 0, 3, 3), (8, 8), None, ValueError, "at least one class"),
        (torch.zeros(1, 2, 3, 3), (8, 0), None, ValueError, "size must be two positive integers"),
        (torch.zeros(1, 2, 3, 3), (8, 8), (9, 8), ValueError, r"crop must be .* at most size \[8, 8\]"),
    ],
)
def test_errors_name_the_argument(masks, size, crop, error, message) -> None:
    with pytest.raises(error, match=message):
        kernels.upsample_argmax(masks, size, crop)
