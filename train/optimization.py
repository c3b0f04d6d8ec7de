"""Optimizers, learning rate and frozen layers of a recipe.

Muon is momentum whose matrices are made orthogonal before they are applied. Source: Jordan et al.,
https://kellerjordan.github.io/posts/muon, with the scale of Liu et al., arXiv:2502.16982, section 2.2, by which AdamW's
learning rates and weight decay suit it. The iteration is float32: that of PyTorch's and timm's optimizer is bfloat16,
in which a CPU without such units takes nine times as long for these products (AMD EPYC).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from ..segmenter import Segmenter
from .presets import Recipe

# The quintic of Jordan et al.; five times takes every singular value of 0.01 to 1 near 1.
_QUINTIC = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5


def freeze(model: Segmenter, recipe: Recipe) -> None:
    """Put the model into training mode without what the recipe freezes.

    Frozen layers stay in evaluation mode, so that no part of them is dropped.

    Raises:
        ValueError: more layers than the encoder has.
    """
    encoder = model.encoder
    if recipe.freeze_layers > len(encoder.blocks):
        raise ValueError(f"freeze_layers must be at most {len(encoder.blocks)}, got {recipe.freeze_layers}")
    model.freeze_encoder(recipe.freeze == "encoder")
    if recipe.freeze_layers:
        first = [f"blocks.{layer}." for layer in range(recipe.freeze_layers)]
        embeddings = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed")
        for name, parameter in encoder.named_parameters():
            if name.startswith((*first, *embeddings)):
                parameter.requires_grad_(False)
    model.train()
    for block in encoder.blocks[: recipe.freeze_layers]:
        block.eval()


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer over all parameters that are trained; weight decay acts on matrices only.

    As usual for Vision Transformers, biases, norms, tokens and position embeddings are not decayed. Muon takes the
    matrices of the encoder's and the decoder's layers, AdamW the rest.

    Raises:
        ValueError: nothing is left to train.
    """
    hidden, decayed, spared = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim < 2 or name.endswith(("_token", "pos_embed", "cls_emb")):
                spared.append(parameter)
            elif recipe.optimizer == "muon" and ".blocks." in name:
                hidden.append(parameter)
            else:
                decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": hidden, "orthogonal": True},
        {"params": decayed},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("every parameter is frozen: there is nothing to train")
    if recipe.optimizer == "sgd":
        return SGD(groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    betas = recipe.beta1, recipe.beta2
    if recipe.optimizer == "muon":
        return Muon(groups, recipe.lr, betas, recipe.weight_decay, recipe.momentum)
    return AdamW(groups, recipe.lr, betas, weight_decay=recipe.weight_decay, fused=True)


def make_schedule(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LambdaLR:
    """``(lr - min_lr) (1 - step / total) ** power + min_lr``, times a linear warm-up; advanced once a step.

    Source: the official program's ``PolynomialLR``.
    """
    return LambdaLR(optimizer, functools.partial(_factor, recipe, total_steps))


def _factor(recipe: Recipe, total_steps: int, step: int) -> float:
    """Return the learning rate at a step as a multiple of ``recipe.lr``."""
    left = max(1 - step / total_steps, 0.0) ** recipe.power
    risen = min((step + 1) / (recipe.warmup + 1), 1.0)
    return risen * ((recipe.lr - recipe.min_lr) * left + recipe.min_lr) / recipe.lr


@contextmanager
def recomputed(model: Segmenter) -> Iterator[None]:
    """Inside the block the layers keep no activations, and run once more in the backward pass."""
    blocks = [*model.encoder.blocks, *getattr(model.decoder, "blocks", [])]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class Muon(AdamW):
    """Muon with Nesterov momentum for the groups of parameters with ``orthogonal=True``, AdamW for all others.

    Args:
        params: groups; parameters of orthogonal ones must be matrices, such as weights of hidden linear layers.
        lr, betas, weight_decay: for both kinds of groups.
        momentum: for the orthogonal groups.

    Raises:
        ValueError: a parameter of an orthogonal group is no matrix.
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
        """Take one step, as ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group in self.param_groups if group["orthogonal"]]
        matrices = [(p, p.grad, group) for group in groups for p in group["params"] if p.grad is not None]
        for parameter, gradient, group in matrices:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW's load_state_dict expects it
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(momentum, group["momentum"]))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])
            parameter.grad = None  # so that AdamW passes over it
        super().step()
        for parameter, gradient, _ in matrices:
            parameter.grad = gradient
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate the nearest matrix with orthonormal rows or columns; singular values end within about 0.7 to 1.2.

    Args:
        matrix: ``(m, n)``; a DTensor is gathered, and the result sharded alike.
    """
    if isinstance(matrix, DTensor):
        return distribute_tensor(orthogonal(matrix.full_tensor()), matrix.device_mesh, matrix.placements)
    wide = matrix.shape[0] <= matrix.shape[1]
    # A CPU without its units is 9 times slower in bfloat16 (AMD EPYC, AVX2); the iteration allows for its rounding.
    x = (matrix if wide else matrix.T).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)
