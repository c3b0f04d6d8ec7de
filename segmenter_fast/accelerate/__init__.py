"""Swap-in of the fused ops for models that other libraries built.

Modules are recognised by their structure, so no other library is imported, and a module is swapped only after a twin
of it with random weights gave the same outputs and gradients both ways (``swap.probe``). What is swapped is the class
of single instances (``swap.forwards``): parents, parameters, hooks and state-dict keys stay as they are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from .forwards import Swapped, swap_class
from .match import survey

Model = TypeVar("Model", bound=nn.Module)

# Where the report lies in the model's __dict__; it travels with deepcopy and pickle.
_REPORT = "_acceleration_report"


@dataclass(frozen=True)
class Replaced:
    """A module that runs on a fused op: its name in the model, its own class, and the op in ``kernels``."""

    name: str
    cls: str
    op: str


@dataclass(frozen=True)
class Left:
    """A module that kept its forward: its name in the model, its class, and why."""

    name: str
    cls: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """What ``accelerate`` replaced and what it left; ``str`` gives a line for each kind."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for item in self.replaced:
            groups.setdefault(f"replaced by kernels.{item.op}: {item.cls}", []).append(item.name or "(model)")
        for other in self.left:
            groups.setdefault(f"left, {other.reason}: {other.cls}", []).append(other.name or "(model)")
        return "\n".join(f"{what} x {len(names)} ({', '.join(names)})" for what, names in groups.items())


def accelerate(model: Model) -> Model:
    """Run the attention of another library's model, and the official mask decoder's tail, on the fused ops.

    Recognised, without importing the library: the official ``Segmenter``, mmsegmentation's ``EncoderDecoder`` with
    Segmenter's backbone and head, timm's Vision Transformers, and every module whose attention has timm's shape
    (``qkv``, ``proj``, ``num_heads`` or ``heads``). The model is changed in place: the forwards of single modules are
    swapped, nothing global. State-dict keys, parameters, hooks, the forward contract and training stay; outputs and
    gradients agree within rounding. Calls with a mask, attention dropout in training, hooks inside an attention and
    wanted attention maps take the original path.

    Each module is tried on random weights first and left where it differs. A second call changes nothing. Undo it
    with ``restore``, also before export to other runtimes, second derivatives (the ops have none), or before putting
    other modules in the place of a swapped one's children.

    Args:
        model: on any device, in any dtype, in train or eval mode.

    Returns:
        The model. ``acceleration_report(model)`` tells what was replaced and what was left and why; a warning says
        it if that is nothing.

    Raises:
        TypeError: not a ``torch.nn.Module``, or a TorchScript module, whose forward is compiled already.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module that is not TorchScript, got {type(model).__name__}")
    replaced, left = [], []
    for name, module, verdict in list(survey(model)):
        if isinstance(verdict, str):
            left.append(Left(name, _class_name(type(module)), verdict))
        elif isinstance(module, Swapped):
            replaced.append(Replaced(name, _class_name(module.original), verdict.op))
        else:
            replaced.append(Replaced(name, _class_name(type(module)), verdict.op))
            module.__class__ = swap_class(verdict, type(module))
    report = AccelerationReport(tuple(replaced), tuple(left))
    model.__dict__[_REPORT] = report
    if not replaced:
        why = "; ".join(sorted({item.reason for item in left})) or "it has no attention of a known kind"
        warnings.warn(f"accelerate replaced nothing in {type(model).__name__}: {why}", stacklevel=2)
    return model


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """What the last ``accelerate(model)`` replaced and left.

    Raises:
        ValueError: the model was not given to ``accelerate``, or it was restored.
    """
    report = vars(model).get(_REPORT)
    if not isinstance(report, AccelerationReport):
        raise ValueError(f"this {type(model).__name__} was not accelerated: call segmenter_fast.accelerate(model)")
    return report


def restore(model: Model) -> Model:
    """Give every module of an accelerated model its own class back; parameters keep their present values.

    Returns:
        The model. One that was never accelerated comes back as it is.

    Raises:
        RuntimeError: something derived a new class from a swapped one since (fully_shard, parametrizations). Undo
            that first; nothing has been changed.
    """
    swapped = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    for name, module in swapped.items():
        if "original" not in vars(type(module)):
            raise RuntimeError(f"{name} is a {type(module).__name__}, made after accelerate: undo that before restore")
    for module in swapped.values():
        module.__class__ = module.original  # type: ignore[assignment]
    for part in model.modules():
        vars(part).pop(_REPORT, None)
    return model


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
