"""Cases of the class scores of patches: ``(B, N, D)`` patches and ``(B, K, D)`` classes to ``(B, N, K)``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference

from ..case import OURS, Case, Variant, compiled, in_pass, judge_by
from ..device import name_of

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
    functions = {"eager": reference.mask_scores, "compile": compiled(reference.mask_scores), OURS: kernels.mask_scores}
    variants: dict[str, Variant | str] = {name: Variant(in_pass(f, 4, backward)) for name, f in functions.items()}
    if device.type == "cuda":
        tuned = compiled(reference.mask_scores, autotune=True)
        variants["compile max-autotune"] = Variant(in_pass(tuned, 4, backward), late=True)
    elements = batch * (patches * dim + classes * dim + patches * classes)
    shape = {"patches": patches, "dim": dim, "classes": classes, "batch": batch}
    return Case(
        parameters={"op": "mask_scores", "pass": pass_, **shape, "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, backward, batch, patches, dim, classes, dtype),
        judge=judge_by(in_pass(reference.mask_scores, 4, backward)),
        variants=variants,
        bytes_moved=elements * dtype.itemsize * (2 if backward else 1),
        # One matrix product forward. Backward: one for the patches and one for the classes.
        flops=2 * batch * patches * dim * classes * (3 if backward else 1),
    )


def _inputs(
    backward: bool, batch: int, patches: int, dim: int, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Patches, classes, weight and bias of the LayerNorm; for the backward pass the gradient of the scores, too."""
    shapes = ((batch, patches, dim), (batch, classes, dim), (classes,), (classes,), (batch, patches, classes))
    tensors = [torch.randn(shape, generator=generator, device=generator.device).to(dtype) for shape in shapes]
    leaves = (tensor.requires_grad_(backward) for tensor in tensors[:4])
    return (*leaves, tensors[4]) if backward else (*leaves,)
