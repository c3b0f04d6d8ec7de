"""Fused ops for models of other libraries.

Modules are matched by their structure (``match``), so no other library is imported, and only after a copy with random
weights gave the same outputs and gradients both ways (``verify``). Only the class of single instances changes
(``forwards``): parents, parameters, hooks and state-dict keys stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")

# Key of the report in the model's __dict__, so that deepcopy and pickle keep it.
_REPORT = "_acceleration_report"


@dataclass(frozen=True)
class Replaced:
    """A module that runs on a fused op: its name in the model, its own class, and the op in ``kernels``."""

    name: str
    cls: str
    op: str
    when: str = ""
    """The calls that run on it, such as "in evaluation"; empty for all."""


@dataclass(frozen=True)
class Left:
    """A module that kept its forward: its name in the model, its class, and the reason."""

    name: str
    cls: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """Modules that ``accelerate`` replaced and left; ``str`` gives a line for each class and reason."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    patch_sized: tuple[str, ...] = ()
    """Names of the modules whose scores stay patch-sized until their bilinear resize is used."""
    linears: tuple[str, ...] = ()
    """Names of the linear layers whose float32 products oneDNN computes, on AMD processors with AVX512."""

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for item in self.replaced:
            what = f"replaced by kernels.{item.op}{' ' * bool(item.when)}{item.when}: {item.cls}"
            groups.setdefault(what, []).append(item.name or "(model)")
        for other in self.left:
            groups.setdefault(f"left, {other.reason}: {other.cls}", []).append(other.name or "(model)")
        for name in self.patch_sized:
            groups.setdefault("scores stay patch-sized, their resize waits", []).append(name or "(model)")
        for name in self.linears:
            groups.setdefault("float32 products by oneDNN instead of MKL", []).append(name or "(model)")
        return "\n".join(f"{what} x {len(names)} ({', '.join(names)})" for what, names in groups.items())


def accelerate(model: Model, heads: Collection[str] = ()) -> Model:
    """Run the attention, the mask decoder, and the resized logits of another library's model on the fused ops.

    Recognised, without importing the library: the official ``Segmenter``, mmsegmentation's ``EncoderDecoder`` with
    Segmenter's backbone and head, timm's Vision Transformers, and every module whose attention has timm's structure
    (``qkv``, ``proj``, ``num_heads`` or ``heads``). The attention of transformers' Vision Transformers (``q_proj`` or
    ``query``, implementation "sdpa") and of timm's DINOv3 runs on the op where it is faster: without gradients, on
    CPUs where C++ kernels run, from some hundred tokens. The model is changed in place: the forwards of single modules
    are replaced, nothing global. State-dict keys, parameters, hooks, the forward contract and training stay; outputs
    and gradients agree within rounding. Calls with a mask, attention dropout in training, hooks inside an attention and
    requested attention maps run the original forward, and so does everything inside ``torch.func`` or forward-mode
    differentiation. Gradients with a graph of their own (``create_graph=True``) are PyTorch's.

    The bilinear resize of a segmentation head's scores waits until it is used: ``argmax``, ``max``, ``topk(1)`` and
    ``softmax`` over the classes and ``cross_entropy`` run on the fused ops without the full-size logits. Every other
    use makes them first, so results stay those of the model; ``made_full_size`` lists such calls.

    Each module is verified on random weights and left if the results differ. A second call changes nothing. ``restore``
    undoes it: needed before export to other runtimes, and before a child of a replaced module is exchanged.

    Args:
        model: on any device, in any dtype, in train or eval mode.
        heads: names, as in ``named_modules``, of further modules whose output, scores ``(B, K, h, w)`` or
            ``(B, N, K)``, is resized bilinearly. A later call keeps them.

    Returns:
        The model. ``acceleration_report(model)`` lists the modules that were replaced, and those left with the reason;
        a warning is given if none was replaced.

    Raises:
        AttributeError: ``heads`` names a module that the model does not have.
        ValueError: ``heads`` names the model, a container, or a module that contains a known head. One that returns
            no scores is an error at its first call.
        TypeError: not a ``torch.nn.Module``, or a TorchScript module, whose forward is compiled already.
    """
    import torch

    from .forwards import Fused, fused_class, mark_linears
    from .heads import mark_heads, named_heads, unmark
    from .match import match_modules

    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module that is not TorchScript, got {type(model).__name__}")
    named = named_heads(model, (heads,) if isinstance(heads, str) else heads)
    unmark(model)
    replaced, left = [], []
    for name, module, match in list(match_modules(model)):
        cls = module.original if isinstance(module, Fused) else type(module)
        if isinstance(match, str):
            left.append(Left(name, f"{cls.__module__}.{cls.__qualname__}", match))
        else:
            replaced.append(Replaced(name, f"{cls.__module__}.{cls.__qualname__}", match.op, match.condition(module)))
            if not isinstance(module, Fused):
                module.__class__ = fused_class(match, cls)
    patch_sized = mark_heads(model, named)
    report = AccelerationReport(tuple(replaced), tuple(left), patch_sized, mark_linears(model))
    model.__dict__[_REPORT] = report
    if not replaced and not patch_sized and not report.linears:
        reasons = "; ".join(sorted({item.reason for item in left})) or "it has no attention of a known kind"
        warnings.warn(f"accelerate replaced nothing in {type(model).__name__}: {reasons}", stacklevel=2)
    return model


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """The report of the last ``accelerate(model)``.

    Raises:
        TypeError: not a ``torch.nn.Module``.
        ValueError: the model was not given to ``accelerate``, or it was restored.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = vars(model).get(_REPORT)
    if not isinstance(report, AccelerationReport):
        raise ValueError(f"this {type(model).__name__} was not accelerated: call segmenter_fast.accelerate(model)")
    return report


def made_full_size(model: nn.Module) -> dict[str, int]:
    """The calls that made full-size logits of an accelerated model, by function and line, and how often each did.

    Raises:
        TypeError, ValueError: as ``acceleration_report``.
    """
    from .full_size import CALLS

    acceleration_report(model)
    counts: dict[str, int] = {}
    for part in model.modules():
        for call, count in getattr(vars(part).get(CALLS), "counts", {}).items():
            counts[call] = counts.get(call, 0) + count
    return counts


def restore(model: Model) -> Model:
    """Give every module of an accelerated model its own class again; parameters keep their values.

    Returns:
        The model, unchanged if it was never accelerated.

    Raises:
        RuntimeError: something derived a new class from a fused one since (fully_shard, parametrizations). Undo that
            first; nothing has been changed.
    """
    from .forwards import Fused
    from .full_size import CALLS

    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if "original" not in vars(type(module)):
            raise RuntimeError(f"{name} is a {type(module).__name__}, made after accelerate: undo that before restore")
    for module in fused.values():
        module.__class__ = module.original  # type: ignore[assignment]
    for part in model.modules():
        vars(part).pop(_REPORT, None)
        vars(part).pop(CALLS, None)
    return model
