"""Resize by strips and its transpose against PyTorch's, for strips from pieces of a cell to whole images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segmenter_fast.kernels.cpu import strips
from segmenter_fast.kernels.cpu.strips import Resize

# Input, output, kept (height, width).
SIZES = [
    ((5, 4), (23, 31), (21, 30)),
    ((4, 5), (4, 5), (4, 5)),
    ((1, 3), (9, 9), (9, 8)),
    ((9, 8), (5, 3), (5, 3)),
    ((2, 2), (64, 7), (64, 7)),
]


@pytest.fixture(params=[1, 100, 400, 1 << 21], ids=lambda elements: f"{elements} elements")
def _elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_STRIP_ELEMENTS", request.param)


@pytest.mark.usefixtures("_elements")
@pytest.mark.parametrize(("grid", "size", "kept"), SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_rows_and_their_transpose(
    grid: tuple[int, int], size: tuple[int, int], kept: tuple[int, int], align_corners: bool
) -> None:
    masks = torch.randn(1, 3, *grid, dtype=torch.float64, requires_grad=True)
    options = {"size": size, "mode": "bilinear", "align_corners": align_corners}
    expected = F.interpolate(masks, **options)[..., : kept[0], : kept[1]]
    upstream = torch.randn_like(expected)
    expected.backward(upstream)

    resize = Resize(masks.detach(), size, kept, align_corners, torch.float64)
    out, gradient = torch.full_like(expected, torch.nan), torch.zeros_like(masks)
    for strip, logits in resize.rows(0):
        out[0, :, strip] = logits.transpose(0, 1)
        resize.add_gradient(0, strip, upstream[0, :, strip].transpose(0, 1), gradient)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, masks.grad, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_elements")
def test_a_nan_reaches_the_rows_that_use_it_and_no_others() -> None:
    resize = Resize(torch.zeros(2, 6, 3), (48, 24), (48, 24), False, torch.float32)
    gradient, upstream = torch.zeros(1, 2, 6, 3), torch.ones(48, 2, 24)
    upstream[20, 1, 12] = torch.nan  # row 20.5 / 8 - 0.5: between 2 and 3, column 1.06: between 1 and 2
    for strip in resize.strips:
        resize.add_gradient(0, strip, upstream[strip], gradient)
    expected = torch.zeros(2, 6, 3, dtype=torch.bool)
    expected[1, 2:4, 1:] = True
    assert torch.equal(gradient[0].isnan(), expected)
