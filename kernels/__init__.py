"""Fused ops for plain-ViT segmentation. ``reference`` holds the same names in plain PyTorch."""

import sys
import types

from . import reference
from .ops.attention import attention
from .ops.lattice import lattice_argmax, lattice_softmax
from .ops.mask_scores import mask_scores
from .ops.upsample import upsample_argmax, upsample_cross_entropy, upsample_softmax

__all__ = [
    "attention",
    "lattice_argmax",
    "lattice_softmax",
    "mask_scores",
    "reference",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_softmax",
]


class _Ops(types.ModuleType):
    """Keeps the public ops from being hidden by the submodules of the same names once those are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and name != "reference" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Ops
