"""Small models of every family, each beside its oracle."""

from __future__ import annotations

import numpy as np
import torch

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter

# One small model per family: both decoders, class token alone, distilled, registers with LayerScale, mmsegmentation's
# numerics, a patch size of its own.
SMALL = {"image_size": 32, "num_classes": 5, "depth": 3, "embed_dim": 128, "num_heads": 2, "decoder_num_heads": 2}
FAMILIES = {
    "mask_16": ("seg_t_mask_16", {}),
    "linear_16": ("seg_t_linear_16", {}),
    "mask_32": ("seg_s_mask_32", {}),
    "linear_32": ("seg_s_linear_32", {}),
    "mask_8": ("seg_t_mask_8", {}),
    "linear_8": ("seg_t_linear_8", {}),
    "deit_mask": ("seg_t_deit_mask_16", {"head_classes": 10}),
    "deit_linear": ("seg_t_deit_linear_16", {}),
    "mmseg": (
        "seg_t_mask_16",
        {"encoder_norm_eps": 1e-6, "pos_embed_mode": "bicubic", "upsample_to": "image"},
    ),
    "registers": (
        "seg_t_mask_16",
        {"patch_size": 14, "num_register_tokens": 4, "pos_embed_prefix": False, "layer_scale": True},
    ),
    "dinov2": ("seg_s_dinov2_linear_14", {"image_size": 56}),
    "dinov3": ("seg_s_dinov3_mask_16", {}),
    "dinov3_swiglu": ("seg_s_dinov3_linear_16", {"mlp": "swiglu", "mlp_ratio": 2.7}),
}


def pair(family: str, dtype: torch.dtype = torch.float64) -> tuple[sf.Segmenter, ReferenceSegmenter]:
    """Model and oracle with one set of weights, large enough that nothing hides in them."""
    name, fields = FAMILIES[family]
    model = _varied(sf.create_model(name, **{**SMALL, **fields}).to(dtype))
    reference = ReferenceSegmenter(model.config).to(dtype).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    return model, reference


def windowed(**fields: object) -> sf.Segmenter:
    """A small model whose labels vary over the image, which it sees through windows of 32 pixels, every 24."""
    given = {**SMALL, "depth": 1, "window_size": 32, "window_stride": 24, **fields}
    return _varied(sf.create_model("seg_t_mask_16", **given), 0.2)


def normalised(model: sf.Segmenter, pixels: torch.Tensor) -> torch.Tensor:
    """``(B, C, H, W)`` uint8 images, scaled and normalised with the model's mean and std."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.config.mean, model.config.std))
    return (pixels / 255 - mean) / std


def pixels(height: int, width: int) -> np.ndarray:
    """The same noise each time: ``(height, width, 3)`` uint8."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _varied(model: sf.Segmenter, noise: float = 0.1) -> sf.Segmenter:
    """The model in evaluation mode, with noise on every weight, biases that start at zero among them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()
