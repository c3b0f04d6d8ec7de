"""From a recipe to an optimizer, a schedule and what stays frozen."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from ..segmenter import Segmenter
from .muon import Muon
from .presets import Recipe


def freeze(model: Segmenter, recipe: Recipe) -> None:
    """Takes what the recipe freezes out of training.

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
    to_training(model, recipe)


def to_training(model: Segmenter, recipe: Recipe) -> None:
    """Training mode, but frozen layers stay in evaluation mode: no part of them is dropped."""
    model.train()
    for block in model.encoder.blocks[: recipe.freeze_layers]:
        block.eval()


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over all parameters that are trained; weight decay acts on matrices only.

    As usual for Vision Transformers, biases, norms, tokens and position embeddings are not decayed. Muon takes the
    matrices of the encoder's and the decoder's layers, AdamW the rest.

    Raises:
        ValueError: nothing is left to train.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("every parameter is frozen: there is nothing to train")
    decayed = [(name, parameter) for name, parameter in trained if _decays(name, parameter)]
    hidden = [parameter for name, parameter in decayed if ".blocks." in name and recipe.optimizer == "muon"]
    taken = {id(parameter) for parameter in hidden}
    groups: list[dict[str, Any]] = [
        {"params": hidden, "orthogonal": True},
        {"params": [parameter for _, parameter in decayed if id(parameter) not in taken]},
        {"params": [parameter for name, parameter in trained if not _decays(name, parameter)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return SGD(groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    betas = recipe.beta1, recipe.beta2
    if recipe.optimizer == "muon":
        return Muon(groups, recipe.lr, betas, recipe.weight_decay, recipe.momentum)
    return AdamW(groups, recipe.lr, betas, weight_decay=recipe.weight_decay, fused=True)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith(("_token", "pos_embed", "cls_emb"))


def make_schedule(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LambdaLR:
    """``(lr - min_lr) (1 - step / total) ** power + min_lr``, times a linear warm-up; stepped once an iteration.

    Source: the official program's ``PolynomialLR``.
    """
    return LambdaLR(optimizer, functools.partial(_factor, recipe, total_steps))


def _factor(recipe: Recipe, total_steps: int, step: int) -> float:
    """The learning rate at a step, as a multiple of ``recipe.lr``."""
    left = max(1 - step / total_steps, 0.0) ** recipe.power
    risen = min((step + 1) / (recipe.warmup + 1), 1.0)
    return risen * ((recipe.lr - recipe.min_lr) * left + recipe.min_lr) / recipe.lr


@contextmanager
def recomputed(model: Segmenter, wanted: bool) -> Iterator[None]:
    """Inside the block the layers keep no activations, but run once more in the backward pass, if that is wanted."""
    blocks = [*model.encoder.blocks, *getattr(model.decoder, "blocks", [])] if wanted else []
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients together, whatever is sharded: a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
