"""Linear layers of the inference form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredLinear(nn.Linear):
    """A linear layer that stores its weights in one dtype and computes in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def store_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of the linear layers within ``module`` to ``dtype``, in place; they compute as before."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.to(dtype)
            child.__class__ = StoredLinear
