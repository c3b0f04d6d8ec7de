"""Judges of the upsample ops by float64 oracles, computed in strips of rows to keep no full-size logits.

Interpolation is a matrix product from the left and from the right, with matrices from ``F.interpolate`` of an
identity, so nothing here shares code with our ops. A judge takes the inputs of a case and returns a function from an
output to its error relative to the largest oracle value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import largest, relative_error

IGNORED = 255
# Elements of the logits of one strip.
STRIP = 2**24


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
