"""Encoder weights of timm's Vision Transformers, and of the DINOv2 and DINOv3 programs.

timm's names are the official ones without the ``encoder.`` prefix. timm runs its weights with a LayerNorm eps of 1e-6
and resizes position embeddings by antialiased bicubic filters. The official program runs the same weights at 1e-5 and
resizes bilinearly. ``encoder_norm_eps=1e-6, pos_embed_mode="bicubic_antialias"`` give timm's own features. The variants
of DINOv2 and DINOv3 have timm's numerics by default; DINOv3's eps is 1e-5 in timm, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..config import SegmenterConfig, Triple
from ..vit import resize_positions
from .build import adapt_channels, rename
from .reading import CheckpointError

HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
_FILE = re.compile(r".*[/\\].*|.*\.(pth|pt|bin|ckpt|safetensors)")
_NAMES = {
    r"^(blocks\.\d+)\.gamma_([12])$": r"\1.ls\2.gamma",  # timm's DINOv3
    r"^(storage|register)_tokens$": "reg_token",  # Meta's DINOv3 and DINOv2, as the rest
    r"^(blocks\.\d+\.mlp)\.w1\.": r"\1.fc1_g.",
    r"^(blocks\.\d+\.mlp)\.w2\.": r"\1.fc1_x.",
    r"^(blocks\.\d+\.mlp)\.w3\.": r"\1.fc2.",
}
_UNUSED = re.compile(r"mask_token|rope_embed\.periods|local_cls_norm\..*|.*\.qkv\.bias_mask")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of a Vision Transformer of timm."""
    return "patch_embed.proj.weight" in state


def numerics(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the resizing of positions in Meta's DINOv2, whose files have a mask token; nothing for other states."""
    if not {"mask_token", "pos_embed", "blocks.0.ls1.gamma"} <= state.keys():
        return {}
    return {"pos_embed_mode": "bicubic_antialias" if "register_tokens" in state else "bicubic_offset"}


def names_a_model(name: str) -> bool:
    """Return whether timm has an architecture of this name, which may end in a tag of weights.

    Raises:
        ImportError: it may be one, but timm is not installed.
    """
    return not _FILE.fullmatch(name) and bool(_import_timm().is_model(name))


def download(name: str, config: SegmenterConfig) -> tuple[Mapping[str, Tensor], dict[str, Triple]]:
    """Fetch weights by timm's name, from the local cache or the network, for an encoder of this configuration.

    Returns:
        The state dict in timm's names; mean and std of the pixels that the weights were trained on.

    Raises:
        ImportError: timm is not installed.
        CheckpointError: timm does not know the name, the weights cannot be fetched, or the model differs from the
            configuration in an activation or position embedding that shapes do not show.
    """
    timm = _import_timm()
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, HfHubHTTPError) as error:
        raise CheckpointError(f"timm cannot fetch {name}, is the network reachable? ({error})") from error
    except RuntimeError as error:
        raise CheckpointError(f"timm cannot make {name}: {error}") from error
    points = torch.linspace(-4, 4, 33)
    wanted = F.gelu(points) if config.mlp == "gelu" else F.silu(points)
    activation = getattr(model.blocks[0].mlp, "act", None) if hasattr(model, "blocks") else None
    if activation is None or not torch.allclose(activation(points), wanted, rtol=0, atol=1e-6):
        raise CheckpointError(f"timm's {name} is no Vision Transformer with the activation of mlp={config.mlp!r}")
    rope = type(getattr(model, "rope", None)).__name__
    if rope != {"learned": "NoneType", "rotary": "RotaryEmbeddingDinoV3"}[config.pos_embed_kind]:
        raise CheckpointError(f"timm's {name} has another position embedding than {config.pos_embed_kind!r}: {rope}")
    return model.state_dict(), {name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")}


def encoder_state(state: Mapping[str, Tensor], config: SegmenterConfig) -> dict[str, Tensor]:
    """Return a timm state dict in our names, without classifier, its position embedding resized to the image size.

    A patch embedding of RGB images is adapted to the configuration's channels.

    A position embedding of no square grid stays as it is, for the strict load to report.
    """
    encoder = {
        rename(key, _NAMES): tensor.float()
        for key, tensor in state.items()
        if not key.startswith(HEADS) and not _UNUSED.fullmatch(key)
    }
    _pack_biases(encoder, config)
    projection = encoder.get("patch_embed.proj.weight")
    if projection is not None and projection.shape[1:2] == (3,) and config.in_channels != 3:
        encoder["patch_embed.proj.weight"] = adapt_channels(projection, config.in_channels, "the encoder")
    positions = encoder.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        if "register_tokens" in state and "cls_token" in encoder:
            # Meta's DINOv2 has a position for the class token but none for registers; timm adds it to the token
            encoder["cls_token"] = encoder["cls_token"] + positions[:, :1]
            encoder["pos_embed"] = positions = positions[:, 1:]
        patches = positions.shape[1] - config.num_prefix_tokens * config.pos_embed_prefix
        side = math.isqrt(max(patches, 0))
        if side**2 == patches > 0 and (side, side) != config.grid:
            encoder["pos_embed"] = resize_positions(positions, (side, side), config.grid, config.pos_embed_mode)
    return encoder


def _pack_biases(encoder: dict[str, Tensor], config: SegmenterConfig) -> None:
    """Make one bias of queries, keys and values, with zeros for keys.

    DINOv3 has no bias for keys: timm leaves it out, Meta masks it.
    """
    for key in [key for key in encoder if key.endswith(".attn.q_bias")]:
        if (other := key.replace("q_bias", "v_bias")) in encoder:
            query, value = encoder.pop(key), encoder.pop(other)
            encoder[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    if config.pos_embed_kind != "rotary":
        return
    whole = (3 * config.embed_dim,)
    for key in [key for key in encoder if key.endswith(".attn.qkv.bias") and encoder[key].shape == whole]:
        query, _, value = encoder[key].chunk(3)
        encoder[key] = torch.cat([query, torch.zeros_like(query), value])
        if not config.qkv_bias and not encoder[key].any():
            del encoder[key]


def _import_timm() -> ModuleType:
    """Import timm, which not every installation has.

    Raises:
        ImportError: timm or torchvision is not installed, or torchvision was built for another torch.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's operators do not load
        raise ImportError(
            f"timm weights need timm and a torchvision that fits torch: pip install 'segmenter-fast[train]' ({error})"
        ) from error
    return timm
