"""torchvision, also where torch is a CPU build and torchvision is not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def import_torchvision() -> ModuleType:
    """torchvision with ``torchvision.transforms.v2`` loaded; what imports torchvision itself works afterwards, too.

    On a CPU build of torch the import of the registry's torchvision fails, because its compiled operators are missing;
    with their schemas declared it works, and nothing here uses them.

    Raises:
        ImportError: it is not installed, saying how to install it.
    """
    try:
        try:
            torchvision = importlib.import_module("torchvision")
        except RuntimeError:
            _declare_operators()
            torchvision = importlib.import_module("torchvision")
        importlib.import_module("torchvision.transforms.v2")
    except ImportError as error:
        raise ImportError(f"torchvision is needed: pip install 'segmenter-fast[train]' ({error})") from error
    return torchvision


@functools.cache
def _declare_operators() -> torch.library.Library:
    """The schemas that torchvision's Python files expect; the cache keeps them alive."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
