"""A model and its accelerated copy, whose small tensors are to have the same losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segmenter_fast as sf
from support.other_models import build, images

IGNORED = 255


def pair(name: str = "official") -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model, its accelerated copy, images and labels."""
    model, x = build(name), images(name)
    labels = torch.randint(7, (len(x), *x.shape[2:]), generator=torch.Generator().manual_seed(0))
    labels[:, :9] = IGNORED
    return model, sf.accelerate(copy.deepcopy(model)), x, labels


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    value = loss(model)
    value.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": value.detach(), **grads}


def assert_same_gradients(model: nn.Module, fast: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    expected, found = gradients(model, loss), gradients(fast, loss)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


def resized(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
