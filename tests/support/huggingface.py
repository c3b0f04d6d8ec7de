"""Small random models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 48,
    "patch_size": 8,
}
# Class, configuration class and fields.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit_task": ("ViTForImageClassification", "ViTConfig", {"qkv_bias": False}),
    "deit": ("DeiTModel", "DeiTConfig", {}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2_task": ("Dinov2ForImageClassification", "Dinov2Config", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 3, "rope_theta": 50.0}),
    "dinov3_gated": ("DINOv3ViTModel", "DINOv3ViTConfig", {"use_gated_mlp": True, "hidden_act": "silu"}),
}
# Those that are accelerated but not read.
DPT = {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "neck_hidden_sizes": [8, 8, 16, 16]}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpt": ("DPTForSemanticSegmentation", "DPTConfig", {**DPT, "fusion_hidden_size": 8}),
    "beit": ("BeitModel", "BeitConfig", {"use_absolute_position_embeddings": True}),
}


def build(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """A model in evaluation mode in which no parameter is trivial."""
    cls, config, own = (MODELS | OTHERS)[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**SMALL, **own, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()
