"""Verification of a fused forward: a trial against the module's own forward, on a copy with random weights.

The copy is on the CPU in float64 whatever the module's device and dtype, so modules on the meta device can be verified.
Its weights are large: at an initialisation of 0.02 all attention probabilities are nearly equal, and a wrong scale or
an ignored bias would pass.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .forwards import Fused, fused_class

# Allowed difference, relative to the largest value of a tensor. The same formula in another order agrees to about
# 1e-14; modules that take their softmax in float32 need 1e-6.
TOLERANCE = 1e-6

# Attributes of every module: weights, children, hooks, mode.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_PLAIN = (int, float, str, type(None), torch.dtype)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def random_copy(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module with random float64 weights on the CPU and without hooks.

    ``stand_ins`` replace the children of the same names.
    """
    memo: dict[int, Any] = {id(getattr(module, name)): stand_in for name, stand_in in stand_ins.items()}
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        # Uniform, of variance 1 for vectors and 2 / fan-in for matrices: attention scores spread over a few units.
        bound = (6 / parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 3**0.5
        values = torch.empty(parameter.shape, dtype=torch.float64, device="cpu")
        values.uniform_(-bound, bound, generator=generator)
        memo.setdefault(id(parameter), nn.Parameter(values))
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(module, memo)


def structure_key(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Hashable | None:
    """A key that is equal for modules which can differ in the values of their weights only: one trial serves them all.

    None for a module with attributes other than numbers, strings, dtypes, tuples of them, and a ``config``, which all
    layers of a model of transformers share.
    """
    parts: list[Hashable] = []
    for prefix, part in module.named_modules():
        if prefix.split(".")[0] in stand_ins:
            continue
        shapes = tuple((name, parameter.shape) for name, parameter in part.named_parameters(recurse=False))
        parts.append((prefix, type(part), shapes))
        for name, value in vars(part).items():
            if name in _MODULE_ATTRIBUTES:
                continue
            if name == "config":
                value = id(value)
            if not all(isinstance(item, _PLAIN) for item in (value if isinstance(value, tuple) else (value,))):
                return None
            parts.append((name, value))
    return tuple(parts)


def find_difference(
    module: nn.Module, fused: type[Fused], calls: Sequence[Call], stand_ins: Mapping[str, nn.Module]
) -> str | None:
    """The reason why ``fused`` may not replace the module's forward, or None.

    Compares outputs and gradients, those of the input and of all vectors among the parameters, for every call, in
    evaluation and in training with the same random numbers.
    """
    random_state = torch.get_rng_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            trial = random_copy(module, stand_ins)
            trial.__dict__["tried"] = True
            return _compare(trial, fused, calls)
    except Exception as error:  # code of any library runs here and may raise anything
        return f"it could not be tried: {type(error).__name__}: {error}"
    finally:
        torch.set_rng_state(random_state)


def _compare(module: nn.Module, fused: type[Fused], calls: Sequence[Call]) -> str | None:
    original = type(module)
    for args, kwargs in calls:
        for training in (False, True):
            module.train(training)
            before, start = _attributes(module), torch.get_rng_state()
            own, reason = _results(module, args, kwargs, fused.pair)
            if reason:
                return reason
            if changed := sorted(_attributes(module).items() ^ before.items()):
                return f"its forward keeps what it computes in {changed[0][0]}"
            torch.set_rng_state(start)
            module.__class__ = fused_class(fused, original)
            ours, reason = _results(module, args, kwargs, fused.pair)
            module.__class__ = original
            if reason or not all(map(_close, ours, own)):
                return f"its outputs or gradients are not those of plain {fused.op}"
    return None


def _attributes(module: nn.Module) -> dict[str, int]:
    """Identities of all attributes of a module and its children."""
    return {
        f"{prefix}.{name}".lstrip("."): id(value)
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if name != "training"
    }


def _results(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pair: bool
) -> tuple[list[Tensor], str | None]:
    """The output with its gradients by the first argument and the vectors, or the reason why it cannot be compared.

    Gradients of the matrices are left out: they cost most of the time and follow from the same values.
    """
    x = args[0].clone().requires_grad_()
    out = module(x, *args[1:], **kwargs)
    if pair:
        if not isinstance(out, tuple) or len(out) != 2 or out[1] is not None:
            return [], "it returns attention maps, or no pair: attn_implementation='sdpa' returns (output, None)"
        out = out[0]
    if isinstance(out, tuple):
        return [], "it returns more than a tensor, and no layer of a known kind around it drops the rest"
    if not isinstance(out, Tensor):
        return [], f"it returns {type(out).__name__}, not a tensor"
    inputs = [x, *(parameter for parameter in module.parameters() if parameter.ndim == 1)]
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True)
    return [out, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True))], None


def _close(ours: Tensor, own: Tensor) -> bool:
    if ours.shape != own.shape:
        return False
    return own.numel() == 0 or bool((ours - own).abs().max() <= TOLERANCE * own.abs().max().clamp(min=1))
