"""Muon: momentum whose matrices are made orthogonal before they are applied.

Source: Jordan et al., https://kellerjordan.github.io/posts/muon, with the scale of Liu et al., arXiv:2502.16982,
section 2.2, by which AdamW's learning rates and weight decay suit it. The iteration is float32: that of PyTorch's and
timm's optimizer is bfloat16, in which a CPU without such units takes nine times as long for these products (AMD EPYC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

# Of the quintic of Jordan et al.; five times takes every singular value of 0.01 to 1 near 1.
_QUINTIC = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5


class Muon(AdamW):
    """Muon with Nesterov momentum for the groups of parameters that say ``orthogonal=True``, AdamW for all others.

    Args:
        params: groups; parameters of orthogonal ones must be matrices, such as weights of hidden linear layers.
        lr, betas, weight_decay: of both.
        momentum: of the orthogonal groups.

    Raises:
        ValueError: an orthogonal group with a parameter that is no matrix.
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float, momentum: float
    ) -> None:
        super().__init__([{"orthogonal": False, **group} for group in params], lr, betas, weight_decay=weight_decay)
        for group in self.param_groups:
            group["momentum"] = momentum
            for parameter in group["params"]:
                if group["orthogonal"] and parameter.ndim != 2:
                    raise ValueError(f"orthogonal parameters must be matrices, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group in self.param_groups if group["orthogonal"]]
        matrices = [(p, p.grad, group) for group in groups for p in group["params"] if p.grad is not None]
        for parameter, gradient, group in matrices:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW's loading wants one
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(momentum, group["momentum"]))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])
            parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient, _ in matrices:
            parameter.grad = gradient
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the nearest matrix with orthonormal rows or columns; singular values end within about 0.7 to 1.2.

    Args:
        matrix: ``(m, n)``; a DTensor is gathered, and the result sharded alike.
    """
    if isinstance(matrix, DTensor):
        return distribute_tensor(orthogonal(matrix.full_tensor()), matrix.device_mesh, matrix.placements)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).float()
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)
