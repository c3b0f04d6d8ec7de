"""Cases of the class scores of patches: ``(B, N, D)`` patches and ``(B, K, D)`` classes to ``(B, N, K)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference

from ..case import OURS, Case, Variant, compiled, relative_error
from ..device import name_of

EPS = 1e-5
# Patches of a grid, width of the decoder, classes. The first is B-Mask/16 at 512 pixels.
SHAPES = ((1024, 768, 150), (1024, 192, 150), (4096, 768, 150), (256, 768, 150), (1024, 768, 19), (1024, 768, 1000))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Cases of the scores: B-Mask/16 at 512 pixels, then other widths, grids and class counts."""
    dtype, batches = (torch.bfloat16, (32, 1)) if device.type == "cuda" else (torch.float32, (1,))
    return [
        scores_case(device, dtype, batch, pass_, *shape)
        for batch in batches[: 1 if quick else None]
        for shape in (SHAPES[:2] if quick else SHAPES)
        for pass_ in ("forward", "forward+backward")
    ]


def scores_case(
    device: torch.device, dtype: torch.dtype, batch: int, pass_: str, patches: int, dim: int, classes: int
) -> Case:
    backward = pass_ == "forward+backward"
    in_pass = _with_gradients if backward else _forward
    elements = batch * (patches * dim + classes * dim + patches * classes)
    shape = {"patches": patches, "dim": dim, "classes": classes, "batch": batch}
    return Case(
        parameters={"op": "mask_scores", "pass": pass_, **shape, "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, backward, batch, patches, dim, classes, dtype),
        judge=partial(_judge, backward),
        variants={
            "eager": Variant(in_pass(reference.mask_scores)),
            "compile": Variant(in_pass(compiled(reference.mask_scores, device))),
            OURS: Variant(in_pass(kernels.mask_scores)),
        },
        bytes_moved=elements * dtype.itemsize * (2 if backward else 1),
        # One matrix product forward. Backward: one for the patches and one for the classes.
        flops=2 * batch * patches * dim * classes * (3 if backward else 1),
    )


def _forward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *inputs: (function(*inputs[:4], EPS),)


def _with_gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = function(*inputs[:4], EPS)
        return (out.detach(), *torch.autograd.grad(out, inputs[:4], inputs[4]))

    return run


def _inputs(
    backward: bool, batch: int, patches: int, dim: int, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Patches, classes, weight and bias of the LayerNorm, and the gradient of the scores."""
    shapes = ((batch, patches, dim), (batch, classes, dim), (classes,), (classes,), (batch, patches, classes))
    tensors = [torch.randn(shape, generator=generator, device=generator.device).to(dtype) for shape in shapes]
    return (*(tensor.requires_grad_(backward) for tensor in tensors[:4]), tensors[4])


def _judge(backward: bool, inputs: tuple[Tensor, ...]) -> Callable[[tuple[Tensor, ...]], float]:
    """The largest error of the scores and of each gradient."""
    oracle = (_with_gradients if backward else _forward)(reference.mask_scores)
    expected = oracle(*(tensor.detach().double().requires_grad_(backward) for tensor in inputs))

    def error(output: Any) -> float:
        errors = [relative_error(a, b) for a, b in zip(output, expected, strict=True)]
        return float("nan") if any(e != e for e in errors) else max(errors)

    return error
