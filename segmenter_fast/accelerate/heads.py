"""Modules whose scores per patch are resized next: by the class names of the libraries, and by what follows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from .. import decoders, reference
from .forwards import Fused, FusedMaskTransformer, fused_class
from .full_size import CALLS, FullSizeCalls
from .lazy import mark_output

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


def mark_heads(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Mark the output of all known heads and of the modules that are named; return the names of the marked ones."""
    found = {}
    for name, module in list(_heads(model)) + [(name, model.get_submodule(name)) for name in names]:
        cls = type(module)
        copied = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
        if not isinstance(module, Fused) and copied and "forward" not in vars(module):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module.__class__ = fused_class(PatchSized, cls)
        if isinstance(module, (PatchSized, FusedMaskTransformer)):
            vars(module).setdefault(CALLS, FullSizeCalls())
            found[name] = module
    return tuple(found)


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


def unmark_heads(model: nn.Module) -> None:
    """Give the marked heads their own classes again."""
    for module in model.modules():
        vars(module).pop(CALLS, None)
        if isinstance(module, PatchSized) and "original" in vars(type(module)):
            module.__class__ = module.original  # type: ignore[assignment]
