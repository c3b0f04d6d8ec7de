"""Encoder weights of timm's Vision Transformers.

timm's names are the official ones without the ``encoder.`` prefix. Its LayerNorm eps is 1e-6, while the official
program runs the same weights at 1e-5: pass ``encoder_norm_eps=1e-6`` for timm's own features.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..config import SegmenterConfig
from ..vit import resize_positions
from .reading import CheckpointError

HEADS = ("head.", "head_dist.", "fc_norm.")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a Vision Transformer of timm."""
    return "patch_embed.proj.weight" in state


def encoder_state(state: Mapping[str, Tensor], config: SegmenterConfig) -> dict[str, Tensor]:
    """timm's state dict without classifier, its position embedding resized to the configuration's image size.

    A position embedding of no square grid stays as it is, for the strict load to report.
    """
    encoder = {key: tensor.float() for key, tensor in state.items() if not key.startswith(HEADS)}
    positions = encoder.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        patches = positions.shape[1] - config.num_prefix_tokens * config.pos_embed_prefix
        side = math.isqrt(max(patches, 0))
        if side**2 == patches > 0 and (side, side) != config.grid:
            encoder["pos_embed"] = resize_positions(positions, (side, side), config.grid, config.pos_embed_mode)
    return encoder


def download(config: SegmenterConfig) -> dict[str, Tensor]:
    """State dict of the configuration's timm backbone, from the local cache or the network.

    Raises:
        ImportError: timm is not installed.
        CheckpointError: the configuration names no backbone, timm does not know it, or it cannot be fetched.
    """
    name = config.timm_backbone
    if name is None:
        raise CheckpointError(f"there are no timm weights for {config.variant}; pass timm_backbone= or a file")
    timm = import_timm()
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, HfHubHTTPError) as error:
        raise CheckpointError(f"timm cannot fetch {name}, is the network reachable? ({error})") from error
    except RuntimeError as error:
        raise CheckpointError(f"timm cannot make {name}: {error}") from error
    return model.state_dict()


@functools.cache
def import_timm() -> ModuleType:
    """timm, also where torch is a CPU build and torchvision is not.

    There, torchvision's import fails because its compiled operators are missing; timm uses none of them.

    Raises:
        ImportError: timm or torchvision is not installed, saying how to install both.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            _declare_torchvision_operators()
        import timm
    except ImportError as error:
        raise ImportError(
            f"timm weights need timm and torchvision: pip install 'segmenter-fast[train]' ({error})"
        ) from error
    return timm


@functools.cache
def _declare_torchvision_operators() -> torch.library.Library:
    """The schemas that torchvision's Python files expect; the cache keeps them alive."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
