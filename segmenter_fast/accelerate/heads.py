"""Modules whose scores per patch are resized next: by the class names of the libraries, and by what follows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import decoders, reference
from .forwards import Fused, FusedLinear, FusedMaskTransformer, fused_class, mark_output
from .full_size import CALLS, FullSizeCalls
from .match import named_attention

# Any module may be marked, because results stay the same: these are the ones whose output is resized.
NAMES = frozenset(
    {
        *("DecoderLinear", "MaskTransformer"),  # the official program
        "BaseDecodeHead",  # mmsegmentation
        *("LinearHead", "LinearClassifier"),  # DINOv3, and Hugging Face's example for DINOv2
        *("SegformerDecodeHead", "UperNetHead", "UperNetFCNHead", "BeitUperHead", "BeitFCNHead"),  # Hugging Face
        *("Data2VecVisionUperHead", "Data2VecVisionFCNHead", "DPTAuxiliaryHead", "MobileViTDeepLabV3"),
        *("FCNHead", "DeepLabHead", "LRASPPHead"),  # torchvision
    }
)
# Mask decoders: of the official program and of mmsegmentation.
CHILDREN = ({"proj_dec", "mask_norm"}, {"patch_proj", "classes_proj", "mask_norm"})


class PatchSized(Fused):
    """A head whose output is marked as scores per patch."""

    op = "upsample_cross_entropy"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return mark_output(self, super().forward(*args, **kwargs))


def mark_heads(model: nn.Module, named: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Mark the output of all known heads and of the ``named`` ones; return the names of the marked ones."""
    found = {}
    for name, module in [*_heads(model), *_last_layer(model), *named.items()]:
        cls = type(module)
        copied = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
        if not isinstance(module, Fused) and copied and "forward" not in vars(module):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module.__class__ = fused_class(PatchSized, cls)
        if isinstance(module, (PatchSized, FusedMaskTransformer)):
            vars(module).setdefault(CALLS, FullSizeCalls()).named = name if name in named else None
            found[name] = module
    return tuple(found)


def named_heads(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The modules of these names, and those that an earlier call named.

    Raises:
        AttributeError: the model has no module of a name.
        ValueError: a module that cannot return scores per patch: the model, a container, a parent of a known head.
    """
    earlier = {name: getattr(vars(module).get(CALLS), "named", None) for name, module in model.named_modules()}
    names = (names,) if isinstance(names, str) else names
    if unknown := sorted({*names} - {*earlier}):
        raise AttributeError(f"heads names modules that {type(model).__name__} has not: {', '.join(unknown)}")
    named = {name: model.get_submodule(name) for name in (*filter(earlier.get, earlier), *names)}
    heads = [name for name, _ in _heads(model)]
    for name, module in named.items():
        inner = [head for head in heads if head.startswith(f"{name}." if name else "") and head != name]
        if name == "" or inner or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            reason = f"contains the head {inner[0]!r}, which is known" if inner else "returns no scores per patch"
            raise ValueError(
                f"heads must name modules that return scores (B, K, h, w) before their resize, such as the last "
                f"convolution; {name!r}, a {type(module).__name__}, {reason}"
            )
    return named


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (decoders.MaskTransformer, reference.MaskTransformer)):  # their models call the ops
            continue
        children = list(module.named_children())
        names = {cls.__name__ for cls in type(module).__mro__}
        if names & NAMES or any(known <= {child for child, _ in children} for known in CHILDREN):
            yield name, module
        elif "DPTSegmentationHead" in names and hasattr(module, "head"):  # segmentation_models_pytorch
            yield f"{name}.head".lstrip("."), module.get_submodule("head")
        elif isinstance(module, nn.Sequential):
            for i, (_, child) in enumerate(children[1:]):
                last = not any(True for _, after in children[i + 1 :] for _ in after.parameters())
                if isinstance(child, nn.Upsample) and child.mode == "bilinear" and last:
                    yield f"{name}.{children[i][0]}".lstrip("."), children[i][1]


def _last_layer(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The last 1x1 convolution, or Linear layer, of a model whose own code resizes: a linear head of DINOv2, say.

    Found are the last modules with parameters, in the order in which they were assigned. A convolution is taken also
    where attention goes before it, because the loop around a model may resize.
    """
    path = [("", model)]
    while inner := [
        (name, child) for name, child in path[-1][1].named_children() if any(True for _ in child.parameters())
    ]:
        name, child = inner[-1]
        path.append((f"{path[-1][0]}.{name}".lstrip("."), child))
    known = {id(module) for _, module in _heads(model)} | {id(model)}
    name, layer = path[-1]
    ours = any(isinstance(part, (decoders.MaskTransformer, decoders.LinearDecoder)) for part in model.modules())
    if ours or any(id(module) in known for _, module in path[1:]):
        return
    resizes = any(_calls_interpolate(type(module)) for _, module in path)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        if resizes or any(map(named_attention, model.modules())):
            yield name, layer
    elif isinstance(layer, nn.Linear) and resizes:
        yield name, layer


def _calls_interpolate(cls: type[nn.Module]) -> bool:
    """True if a method of a class, or of its bases below ``Module``, names ``interpolate``."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    codes = [code for base in bases for value in vars(base).values() if (code := getattr(value, "__code__", None))]
    return any("interpolate" in code.co_names for code in codes)


def unmark(model: nn.Module) -> None:
    """Give the marked heads, whose counts stay, and the linear layers their own classes again."""
    for module in model.modules():
        if isinstance(module, (PatchSized, FusedLinear)) and "original" in vars(type(module)):
            module.__class__ = module.original  # type: ignore[assignment]
