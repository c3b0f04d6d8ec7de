"""Tensor functions with random arguments, for chains of them."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Step = Callable[[Any], Any]
COMMON = [
    "argmax",
    "max",
    "topk",
    "softmax",
    "cross_entropy",
    "getitem",
    "detach",
    "to",
    "float",
    "squeeze0",
    "unsqueeze",
    "unbind",
    "contiguous",
    "clone",
]


class Double(torch.autograd.Function):
    """A function below ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def dim(r: random.Random, x: Tensor) -> int:
    return r.choice((1, -3, *range(-x.ndim, x.ndim))) if x.ndim else 0


def index(r: random.Random, x: Tensor) -> Any:
    """Crops and batch indices mostly, and others."""
    h, w = (max(side, 1) for side in (1, 1, *x.shape)[-2:])
    return r.choice(
        (
            (..., slice(r.randint(1, h)), slice(r.randint(1, w))),
            (slice(None), slice(None), slice(-1), slice(0, r.randint(1, w))),
            (..., slice(1, None)),
            (..., slice(None, None, 2)),
            (slice(None), slice(2)),
            (slice(r.randint(0, 1), r.randint(1, 2)),),
            r.randint(-2, 1),
            slice(None, None, 2),
            (None, ...),
            None,
            ...,
            (r.randint(0, 1), slice(None), slice(h - 1)),
            (0, 1),
            [0],
            torch.tensor([0]),
            True,
            (slice(0),),
        )
    )


def cross_entropy(r: random.Random, x: Tensor) -> Step:
    shape, classes = (*x.shape[:1], *x.shape[2:]), max(x.shape[1] if x.ndim > 1 else 1, 1)
    generator, ignored = torch.Generator().manual_seed(r.randint(0, 999)), r.choice((-100, 255, 0))
    target = torch.randint(classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = ignored
    target = r.choice((target, target, target, target[None], target.int(), target.float()))
    options = {
        "weight": r.choice((None, None, torch.linspace(0.5, 2, classes).to(x.dtype))),
        "ignore_index": ignored,
        "reduction": r.choice(("mean", "sum", "none")),
        "label_smoothing": r.choice((0.0, 0.1)),
    }
    return r.choice(
        (lambda y: F.cross_entropy(y, target, **options), lambda y: nn.CrossEntropyLoss(**options)(y, target))
    )


def step(r: random.Random, x: Tensor, rounded: bool, resized: bool, first: bool) -> tuple[str, Step]:
    """A function of a tensor like ``x``. Labels of values that were rounded on the way may differ, and are left out."""
    d, keep, i = dim(r, x), r.choice((True, False)), index(r, x)
    dtype, wide = r.choice((torch.float32, torch.float64, torch.int64, torch.float16)), r.choice((None, torch.float64))
    labels: dict[str, Step] = {
        "argmax": lambda y: y.argmax(d, keepdim=keep),
        "torch.argmax": lambda y: torch.argmax(input=y, dim=1),
        "argmax()": lambda y: y.argmax(),
        "max": lambda y: y.max(d, keep),
        "torch.max": lambda y: torch.max(y, dim=d),
        "topk": lambda y: y.topk(1, dim=d),
        "topk2": lambda y: y.topk(2, dim=d),
        "softmax.argmax": lambda y: y.softmax(1).argmax(1),
    }
    plain: dict[str, Step] = {
        "softmax": lambda y: y.softmax(d),
        "F.softmax": lambda y: F.softmax(y, dim=d, dtype=wide),
        "cross_entropy": cross_entropy(r, x),
        "cross_entropy ": cross_entropy(r, x),
        "getitem": lambda y: y[i],
        "getitem ": lambda y: y[i],
        "squeeze": lambda y: y.squeeze(),
        "squeeze0": lambda y: torch.squeeze(y, 0),
        "unsqueeze": lambda y: y.unsqueeze(r.choice((0,))),
        "unsqueeze1": lambda y: y.unsqueeze(dim=1),
        "detach": lambda y: y.detach(),
        "to": lambda y: y.to(dtype),
        "to cpu": lambda y: y.to("cpu", non_blocking=True),
        "to copy": lambda y: y.to(y.dtype, copy=True),
        "to other": lambda y: y.to(y),
        "float": lambda y: y.float(),
        "half": lambda y: y.half(),
        "contiguous": lambda y: y.contiguous(),
        "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
        "clone": lambda y: y.clone(),
        "cpu": lambda y: y.cpu(),
        "unbind": lambda y: y.unbind(0),
        "iterate": lambda y: list(y),
        "new": lambda y: (y.new_tensor([1, 2]), y.new_zeros(2, 3), y.new_full((2,), 3.0, dtype=torch.float16)),
        "like": lambda y: (torch.ones(1).to(y), torch.ones(1).type_as(y), torch.ones(1).expand_as(y)),
        "facts": lambda y: (y.shape, y.stride(), y.size(-1), y.ndim, len(y), y.numel(), y.dtype, y.device, y.is_leaf),
        "more facts": lambda y: (y.requires_grad, y.is_contiguous(), torch.is_floating_point(y), y.is_cuda),
        "exp": lambda y: y.exp(),
        "add": lambda y: y + 1,
        "self": lambda y: y * y,
        "relu": F.relu,
        "sum": lambda y: y.sum(),
        "mean": lambda y: y.mean((0, 1)),
        "log_softmax": lambda y: F.log_softmax(y, 1),
        "flip": lambda y: y.flip(-1),
        "permute": lambda y: y.transpose(0, -1),
        "cat": lambda y: torch.cat([y, y]),
        "stack": lambda y: torch.stack((y, y), 1),
        "chunk": lambda y: y.chunk(2, 1),
        "where": lambda y: torch.where(y > 0, y, 0),
        "compare": lambda y: y > 0.5,
        "out": lambda y: torch.add(y.detach(), 1, out=torch.empty_like(y.detach())),
        "resize": lambda y: F.interpolate(y, size=(9, 7), mode="bilinear", align_corners=keep),
        "resize2": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
        "resize again": lambda y: F.interpolate(y, size=y.shape[2:], mode="bilinear", align_corners=keep),
        "nearest": lambda y: F.interpolate(y, size=(5, 5)),
        "Upsample": lambda y: nn.Upsample(scale_factor=1.5, mode="bilinear")(y),
        "numpy": lambda y: y.detach().numpy().copy(),
        "item": lambda y: y.flatten()[0].item(),
        "tolist": lambda y: y.detach()[..., :1].tolist(),
        "repr": lambda y: repr(y.detach()),
        "pickle": lambda y: pickle.loads(pickle.dumps(y.detach())),
        "deepcopy": lambda y: copy.deepcopy(y.detach()),
        "save": lambda y: saved(y.detach()),
        "Function": Double.apply,
        "checkpoint": lambda y: checkpoint(torch.sin, y, use_reentrant=keep),
        "no_grad": lambda y: no_grad(y, i),
        "inference": lambda y: inference(y),
        "add_": lambda y: y.add_(1),
        "setitem": lambda y: y.__setitem__((..., 0), 0.0),
        "setitem 0": lambda y: y[0].mul_(2),
        "zero_ detached": lambda y: y.detach().zero_(),
        "setitem of other": lambda y: torch.zeros(y.shape, dtype=y.dtype).__setitem__(..., y),
        "data": lambda y: y.data,
        "T": lambda y: y.mT,
        "view": lambda y: y.view(-1),
        "reshape": lambda y: y.reshape(-1),
        "vmap": lambda y: torch.vmap(lambda z: z * 2)(y),
        "register_hook": lambda y: y.register_hook(lambda grad: grad * 2) and None,
        "grad": lambda y: torch.autograd.grad(y.exp().sum(), y, retain_graph=True),
        "hash": lambda y: len({y, y}),
    }
    table = plain if rounded else plain | labels
    if resized:  # a tensor whose resize waits may not be changed
        table = {
            name: function for name, function in table.items() if not {"add_", "setitem", "zero_"} & set(name.split())
        }
    if not first:  # gradients of earlier results do not pass the tensor
        table.pop("register_hook", None)
    # The functions that wait, and the results without the resized tensor, in half of the steps.
    common = [name for name in COMMON if name in table]
    name = r.choice(common) if r.random() < 0.5 else r.choice(list(table))
    return name, table[name]


def no_grad(y: Tensor, i: Any) -> Tensor:
    with torch.no_grad():
        return y[i]


def inference(y: Tensor) -> float:
    with torch.inference_mode():
        return y.softmax(1).sum().item()


def is_nan(y: Tensor) -> bool:
    """True for a loss over no pixel. Gradients of what follows it are NaN times zero."""
    return y.ndim == 0 and bool(y.isnan())


def saved(y: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
