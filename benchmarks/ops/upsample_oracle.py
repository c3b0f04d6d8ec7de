"""Float64 oracles of the upsample ops, in strips of rows: no tensor of the size of the logits at any case.

Interpolation is a matrix product from the left and from the right. The matrices come from ``F.interpolate`` of an
identity, so nothing here shares code with our ops. Each judge takes the inputs of a case and returns a function
from an output to its error relative to the largest oracle value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import relative_error

IGNORED = 255
# Elements of the logits of one strip.
STRIP = 2**24


def judge_argmax(inputs: tuple[Any, ...]) -> Callable[[Tensor], float]:
    """Error: how far the score at the chosen label lies below the best one, relative to the largest score."""
    masks, size = inputs

    def error(labels: Tensor) -> float:
        if labels.shape != (masks.shape[0], *size) or not 0 <= labels.min() <= labels.max() < masks.shape[1]:
            return float("inf")
        short = [
            (logits.amax(0) - logits.gather(0, labels[b, rows].long().unsqueeze(0))[0]).max()
            for b, rows, logits in _strips(masks, size)
        ]
        return (torch.stack(short).max() / masks.abs().max()).item()

    return error


def judge_softmax(inputs: tuple[Any, ...]) -> Callable[[Any], float]:
    """Error of the probabilities; with a gradient among the inputs the larger one of it and the masks' gradient."""
    masks, size, *grads = inputs
    grad_masks = torch.zeros_like(masks, dtype=torch.float64, requires_grad=False)
    if grads:
        left, right = _matrices(masks, size)
        for b, rows, logits in _strips(masks, size):
            p, grad = logits.softmax(0), grads[0][b, :, rows].double()
            grad_masks[b] += left[rows].mT @ (p * (grad - (p * grad).sum(0))) @ right

    def error(output: Any) -> float:
        probabilities, grad = output if grads else (output, None)
        if probabilities.shape != (*masks.shape[:2], *size):
            return float("inf")
        worst = [
            (probabilities[b, :, rows].double() - logits.softmax(0)).abs().max()
            for b, rows, logits in _strips(masks, size)
        ]
        # The largest probability counts as 1, also where no class is that sure.
        of_output = torch.stack(worst).max().item()
        return of_output if grad is None else _larger(of_output, relative_error(grad, grad_masks))

    return error


def judge_cross_entropy(inputs: tuple[Any, ...]) -> Callable[[Any], float]:
    """Error of the loss; where masks want a gradient the larger one of it and the gradient's."""
    masks, target = inputs
    left, right = _matrices(masks, target.shape[1:])
    valid = target != IGNORED
    count = valid.sum()
    loss = torch.zeros((), dtype=torch.float64, device=masks.device)
    grad_masks = torch.zeros_like(masks, dtype=torch.float64, requires_grad=False)
    for b, rows, logits in _strips(masks, target.shape[1:]):
        keep = valid[b, rows]
        labels = target[b, rows].masked_fill(~keep, 0).unsqueeze(0)
        loss += ((logits.logsumexp(0) - logits.gather(0, labels)[0]) * keep).sum() / count
        grad = logits.softmax(0).scatter_add_(0, labels, -torch.ones_like(logits[:1]))
        grad_masks[b] += left[rows].mT @ (grad * keep / count) @ right

    def error(output: Any) -> float:
        if not masks.requires_grad:
            return relative_error(output, loss)
        return _larger(relative_error(output[0], loss), relative_error(output[1], grad_masks))

    return error


def _larger(a: float, b: float) -> float:
    """The larger error; NaN if either is. ``max`` would drop a NaN that comes second."""
    return a if a != a or a > b else b


def _matrices(masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``(H, h)`` and ``(W, w)`` float64: ``left @ masks @ right.T`` is the bilinear resize to ``size``."""

    def matrix(size_in: int, size_out: int) -> Tensor:
        identity = torch.eye(size_in, dtype=torch.float64)[None, None]
        return F.interpolate(identity, size=(size_out, size_in), mode="bilinear")[0, 0].to(masks.device)

    return matrix(masks.shape[2], size[0]), matrix(masks.shape[3], size[1])


def _strips(masks: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Image index, rows, and their float64 logits ``(K, rows, W)``."""
    left, right = _matrices(masks, size)
    step = max(1, STRIP // (masks.shape[1] * size[1]))
    for b in range(masks.shape[0]):
        image = masks[b].detach().double()
        for start in range(0, size[0], step):
            rows = slice(start, start + step)
            yield b, rows, left[rows] @ image @ right.mT
