"""Cases of the three upsample ops: one grid of settings, and one table of the ops.

Masks have the layout in which eager PyTorch is fastest on a CPU. The argmax takes channels-last ones, as the model
makes them, in 0.6 of the time; softmax and cross-entropy over channels-last logits take 1.4 to 1.9 times as long.

The judges use float64 oracles in strips of rows to keep no full-size logits. They interpolate by matrix products, with
matrices from ``F.interpolate`` of an identity, so they share no code with our ops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import kernels

from ..case import OURS, Case, Variant, compiled, in_pass, largest, relative_error
from ..device import name_of

IGNORED = 255
# Elements of the logits of one strip.
STRIP = 2**24
CLASSES = (150, 19, 59, 1000)
PATCHES = (16, 8, 32)
SIZES = (512, 640, 1024)
MAPS = ("smooth", "noise")
FORWARD, BOTH = "forward", "forward+backward"
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Masks:
    """The scores of a case: ``map`` is the kind of their values, ``size`` the pixels a side after upsampling."""

    map: str = MAPS[0]
    classes: int = CLASSES[0]
    patch: int = PATCHES[0]
    size: int = SIZES[0]


@dataclass(frozen=True)
class Op:
    """``peer`` is PyTorch's arithmetic, ``ours`` the fused op; both take masks, and a size or a target.

    ``copies`` gives for each pass how many tensors of the size of the logits the peer holds at once; the first pass is
    the main one.
    """

    peer: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    judge: Callable[..., Any]
    copies: dict[str, int]
    cpu_batch: int = 1


def judge_argmax(inputs: tuple[Any, ...]) -> Callable[[Tensor], float]:
    """The largest gap of a chosen label's score to the best score, relative to the largest score."""
    masks, size = inputs

    def error(labels: Tensor) -> float:
        if labels.shape != (masks.shape[0], *size) or not 0 <= labels.min() <= labels.max() < masks.shape[1]:
            return float("inf")
        gaps = [
            (logits.amax(0) - logits.gather(0, labels[b, rows].long().unsqueeze(0))[0]).max()
            for b, rows, logits in _strips(masks.double(), size)
        ]
        return (torch.stack(gaps).max() / masks.abs().max()).item()

    return error


def judge_softmax(inputs: tuple[Any, ...]) -> Callable[[Any], float]:
    """Error of the probabilities, or with an output gradient among the inputs the larger of it and the gradient's."""
    masks, size, *grads = inputs
    exact = masks.detach().double().requires_grad_(bool(grads))
    grad_masks = torch.zeros_like(exact)
    if grads:
        for b, rows, logits in _strips(exact, size):
            grad_masks += torch.autograd.grad(logits.softmax(0), exact, grads[0][b, :, rows].double())[0]

    def error(output: Any) -> float:
        probabilities, grad = output if grads else (output, None)
        if probabilities.shape != (*masks.shape[:2], *size):
            return float("inf")
        gaps = [
            (probabilities[b, :, rows].double() - logits.softmax(0)).abs().max()
            for b, rows, logits in _strips(exact.detach(), size)
        ]
        # The largest probability counts as 1, so the error is absolute.
        gap = torch.stack(gaps).max().item()
        return largest([gap, relative_error(grad, grad_masks)]) if grads else gap

    return error


def judge_cross_entropy(inputs: tuple[Any, ...]) -> Callable[[Any], float]:
    """Error of the loss, or where masks require a gradient the larger of it and the gradient's."""
    masks, target = inputs
    exact = masks.detach().double().requires_grad_()
    count = (target != IGNORED).sum()
    loss, grad_masks = torch.zeros((), dtype=torch.float64, device=masks.device), torch.zeros_like(exact)
    for b, rows, logits in _strips(exact, target.shape[1:]):
        part = F.cross_entropy(logits[None], target[b : b + 1, rows], ignore_index=IGNORED, reduction="sum") / count
        grad_masks += torch.autograd.grad(part, exact)[0]
        loss += part.detach()
    oracle = (loss, grad_masks) if masks.requires_grad else loss
    return lambda output: relative_error(output, oracle)


def _strips(masks: Tensor, size: tuple[int, ...]) -> Iterator[tuple[int, slice, Tensor]]:
    """For float64 masks: image index, rows, and their logits ``(K, rows, W)``."""

    def resize(size_in: int, size_out: int) -> Tensor:
        """``(size_out, size_in)``: the matrix of a bilinear resize."""
        identity = torch.eye(size_in, dtype=torch.float64)[None, None]
        return F.interpolate(identity, size=(size_out, size_in), mode="bilinear")[0, 0].to(masks.device)

    left, right = resize(masks.shape[2], size[0]), resize(masks.shape[3], size[1])
    step = max(1, STRIP // (masks.shape[1] * size[1]))
    for b in range(masks.shape[0]):
        for start in range(0, size[0], step):
            rows = slice(start, start + step)
            yield b, rows, left[rows] @ masks[b] @ right.mT


def _interpolate(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(masks, size=size, mode="bilinear")


OPS = {
    "upsample_argmax": Op(
        peer=lambda masks, size: _interpolate(masks, size).argmax(1),
        ours=kernels.upsample_argmax,
        judge=judge_argmax,
        copies={FORWARD: 1},
    ),
    "upsample_cross_entropy": Op(
        peer=lambda masks, target: F.cross_entropy(
            _interpolate(masks, target.shape[1:]).float(), target, ignore_index=IGNORED
        ),
        ours=partial(kernels.upsample_cross_entropy, ignore_index=IGNORED),
        judge=judge_cross_entropy,
        copies={BOTH: 4, FORWARD: 2},
        cpu_batch=2,
    ),
    "upsample_softmax": Op(
        peer=lambda masks, size: _interpolate(masks, size).softmax(1),
        ours=kernels.upsample_softmax,
        judge=judge_softmax,
        copies={FORWARD: 2, BOTH: 4},
    ),
}


def cases(op: str, device: torch.device, quick: bool) -> list[Case]:
    """Cases of ``op``: 150 classes, patch 16, 512 pixels in each pass; then one axis at a time; then all others."""
    main, other, (batch, *other_batches) = torch.float32, torch.bfloat16, (OPS[op].cpu_batch,)
    if device.type == "cuda":
        main, other, batch, other_batches = other, main, 8, [1]
    first, noise = Masks(), Masks(map="noise")
    main_pass, *other_passes = OPS[op].copies
    make = partial(upsample_case, op, device)
    if quick:
        return [make(main, batch, main_pass, masks) for masks in (first, noise, Masks(classes=19), Masks(patch=32))]
    axes = [Masks(classes=classes) for classes in CLASSES]
    axes += [Masks(patch=patch) for patch in PATCHES] + [Masks(size=size) for size in SIZES]
    grid = [Masks(map_, *rest) for *rest, map_ in itertools.product(CLASSES, PATCHES, SIZES, MAPS)]
    settings = [(main, batch, main_pass, masks) for masks in dict.fromkeys((first, noise, *axes, *grid))]
    settings[1:1] = [(main, batch, pass_, first) for pass_ in other_passes]
    settings[2 + len(other_passes) : 2 + len(other_passes)] = [
        *((main, other_batch, main_pass, first) for other_batch in other_batches),
        (other, batch, main_pass, first),
    ]
    return [make(*setting) for setting in settings]


def upsample_case(op: str, device: torch.device, dtype: torch.dtype, batch: int, pass_: str, masks: Masks) -> Case:
    table, backward = OPS[op], pass_ == BOTH
    shape = (batch, masks.classes, masks.size // masks.patch, masks.size // masks.patch)
    logits = batch * masks.classes * masks.size**2
    needs_bytes = table.copies[pass_] * logits * dtype.itemsize
    variants: dict[str, Variant | str] = {
        "eager": Variant(in_pass(table.peer, 2, backward), needs_bytes=needs_bytes),
        "compile": Variant(in_pass(compiled(table.peer), 2, backward), needs_bytes=needs_bytes),
        OURS: Variant(in_pass(table.ours, 2, backward)),
    }
    if dtype is not torch.float32 and backward:
        # PyTorch sums the gradient of a low-precision F.interpolate in that precision; this peer does not.
        in_float32 = in_pass(lambda scores, *rest: table.peer(scores.float(), *rest), 2, backward)
        variants["eager float32"] = Variant(in_float32, needs_bytes=2 * needs_bytes)
    if device.type == "cuda":
        tuned = in_pass(compiled(table.peer, autotune=True), 2, backward)
        variants["compile max-autotune"] = Variant(tuned, needs_bytes=needs_bytes, late=True)
    return Case(
        parameters={"op": op, "pass": pass_, **asdict(masks), "batch": batch, "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, op, backward, shape, masks, dtype),
        judge=table.judge,
        variants=variants,
        bytes_moved=_least_bytes(op, backward, shape, masks.size, dtype),
    )


def _inputs(
    op: str, backward: bool, shape: Shape, settings: Masks, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    """Masks; the size, or a target for the cross-entropy; the gradient of the result where one is needed."""
    size = (settings.size, settings.size)
    make_map = smooth_map if settings.map == "smooth" else _noise
    layout = torch.channels_last if op == "upsample_argmax" else torch.contiguous_format
    masks = make_map(shape, generator).to(dtype).contiguous(memory_format=layout).requires_grad_(backward)
    if op == "upsample_cross_entropy":
        return masks, block_target(shape, size, generator)
    if backward:
        return masks, size, _noise((*shape[:2], *size), generator).to(dtype)
    return masks, size


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def smooth_map(shape: Shape, generator: torch.Generator) -> Tensor:
    """Scores like a trained decoder's: regions with one clear class each, soft borders, a little noise.

    Every pixel of an image belongs to the nearest of 12 points; the class of a region leads by 6 standard deviations.
    """
    b, k, h, w = shape
    device = generator.device
    points = torch.rand((b, 12, 2), generator=generator, device=device)
    labels = torch.randint(k, (b, 12), generator=generator, device=device)
    ys, xs = ((torch.arange(n, device=device) + 0.5) / n for n in (h, w))
    distance = (points[:, :, :1, None] - ys[:, None]) ** 2 + (points[:, :, 1:, None] - xs) ** 2  # (B, 12, h, w)
    region = labels.gather(1, distance.argmin(1).flatten(1)).view(b, 1, h, w)
    lead = torch.zeros(shape, device=device).scatter_(1, region, 6.0)
    soft = F.avg_pool2d(lead, 3, stride=1, padding=1, count_include_pad=False)
    coarse = _noise((b, k, max(h // 8, 2), max(w // 8, 2)), generator)
    return soft + F.interpolate(coarse, size=(h, w), mode="bicubic") + 0.1 * _noise(shape, generator)


def block_target(shape: tuple[int, ...], size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``(B, H, W)`` int64 labels of ``(B, K, ...)`` scores, in squares of eight pixels; one in twenty is ignored."""
    grid = (shape[0], -(-size[0] // 8), -(-size[1] // 8))
    labels = torch.randint(shape[1], grid, generator=generator, device=generator.device)
    # Class 255 of more than 255 classes is ignored, too.
    ignored = torch.rand(grid, generator=generator, device=generator.device) < 0.05
    labels = labels.masked_fill(ignored, IGNORED).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return labels[:, : size[0], : size[1]].contiguous()


def _least_bytes(op: str, backward: bool, shape: Shape, size: int, dtype: torch.dtype) -> int:
    """Every input read once, every output written once."""
    pixels = shape[0] * size * size
    masks = math.prod(shape) * dtype.itemsize
    logits = pixels * shape[1] * dtype.itemsize
    if op == "upsample_argmax":
        return masks + pixels * (1 if shape[1] <= 256 else 4)
    if op == "upsample_softmax":
        return masks + logits + (2 * logits + masks if backward else 0)
    return masks + 8 * pixels + (masks if backward else 0)
