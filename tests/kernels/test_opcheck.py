"""Every op passes torch.library.opcheck, with and without gradients."""

from __future__ import annotations

import pytest
import torch

import segmenter_fast.kernels  # noqa: F401  (registers the operators)

ops = torch.ops.segmenter_fast


def masks(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def target(b: int, h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 3, (b, h, w))


def lattices(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows, cols = torch.randint(0, 3, (2, 2, 5)), torch.randint(0, 3, (2, 2, 6))
    return scores, rows, torch.rand(2, 5), cols, torch.rand(2, 6)


CASES = {
    "attention": lambda: (ops.attention, (masks(2, 5, 3, 2, 16), 0.25, True)),
    "attention without grad": lambda: (ops.attention, (masks(2, 5, 3, 2, 16, grad=False), 0.25, False)),
    "lattice_argmax": lambda: (ops.lattice_argmax, lattices(torch.randn(5, 7))),
    "lattice_softmax": lambda: (ops.lattice_softmax, lattices(torch.randn(5, 7))),
    "mask_scores": lambda: (ops.mask_scores, (masks(2, 5, 8), masks(2, 3, 8), masks(3), masks(3), 1e-5)),
    "upsample_argmax": lambda: (ops.upsample_argmax, (masks(2, 3, 4, 5, grad=False), [16, 20], [13, 17], False)),
    "upsample_softmax": lambda: (ops.upsample_softmax, (masks(2, 3, 4, 5), [16, 20], [13, 17], False)),
    "upsample_cross_entropy mean": lambda: (
        ops.upsample_cross_entropy,
        (masks(2, 3, 4, 5), target(2, 13, 17), [16, 20], 255, None, 0.0, "mean", False, True),
    ),
    "upsample_cross_entropy none": lambda: (
        ops.upsample_cross_entropy,
        (masks(2, 3, 4, 5), target(2, 13, 17), [16, 20], 255, torch.rand(3), 0.1, "none", True, False),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    op, args = CASES[case]()
    torch.library.opcheck(op.default, args)
