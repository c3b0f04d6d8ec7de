"""Models in words and numbers, for ``segmenter-fast info`` and ``variants`` and for model cards."""

from __future__ import annotations

import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .config import PUBLISHED_MIOU, VARIANTS, SegmenterConfig
from .reference import ReferenceSegmenter

# Programs by their numerics: encoder eps, decoder eps, resizing of positions or "rotary", size of the upsampled masks.
_PROGRAMS = {
    (1e-5, 1e-5, "bilinear", "padded"): "the official program",
    (1e-6, 1e-5, "bicubic", "image"): "mmsegmentation",
    (1e-6, 1e-5, "bicubic_antialias", "padded"): "timm in the encoder, the official program in the decoder",
    (1e-5, 1e-5, "rotary", "padded"): "timm in the encoder, the official program in the decoder",
}


def count_parameters(model: nn.Module) -> int:
    """Return the number of values in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(config: SegmenterConfig, size: int = 512) -> int:
    """Multiply-accumulates of the matrix products for one square image of ``size`` pixels, up to the masks.

    Counted on the plain PyTorch model on the meta device, without softmax, norms and the like.
    """
    with torch.device("meta"):
        model, images = ReferenceSegmenter(config).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.masks(images)
    return counter.get_total_flops() // 2


def variants_table() -> Table:
    """Every named variant with parameters, multiply-accumulates at 512 x 512 and the published accuracy."""
    table = Table(
        title="Variants, 150 classes",
        caption="mIoU: ADE20K validation, single / multiple scales, as the authors of the paper report it for their "
        "weights (L at 640). Not measured with this program.",
    )
    for heading in ("variant", "parameters", "GMAC at 512", "published mIoU"):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            parameters = count_parameters(ReferenceSegmenter(config))
        published = " / ".join(f"{value:.1f}" for value in PUBLISHED_MIOU.get(name, ()))
        size, macs = f"{parameters / 1e6:.1f} M", f"{count_macs(config) / 1e9:.1f}"
        table.add_row(name, size, macs, published)
    return table


def info_table(model: nn.Module, config: SegmenterConfig, origin: str) -> Table:
    """Origin, costs and configuration of a model."""
    table = Table(title=origin, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    costs = {
        "parameters": f"{count_parameters(model):,}",
        "GMAC at 512 x 512": f"{count_macs(config) / 1e9:.1f}",
    }
    for name, value in (costs | describe_config(config)).items():
        table.add_row(name, value)
    return table


def describe_config(config: SegmenterConfig) -> dict[str, str]:
    """Architecture, numerics and classes of a configuration, in words."""
    tokens = {"class": config.class_token, "distillation": config.distillation_token}
    prefix = [name for name, present in tokens.items() if present]
    if config.num_register_tokens:
        prefix.append(f"{config.num_register_tokens} registers")
    decoder = "linear"
    if config.decoder == "mask":
        decoder = f"mask transformer, {config.decoder_depth} layers, {config.decoder_num_heads} heads"
    learned = config.pos_embed_kind == "learned"
    resizing = config.pos_embed_mode if learned else config.pos_embed_kind
    numerics = (config.encoder_norm_eps, config.decoder_norm_eps, resizing, config.upsample_to)
    small = "enlarged to the window" if config.upscale_small_images else "as they are"
    return {
        "variant": config.variant,
        "numerics of": _PROGRAMS.get(numerics, "no program we know"),
        "image size": f"{config.image_size[0]} x {config.image_size[1]}, patches of {config.patch_size}",
        "window, stride": f"{config.window_size}, {config.window_stride}; smaller images: {small}",
        "encoder": f"width {config.embed_dim}, {config.depth} layers, {config.num_heads} heads",
        "prefix tokens": ", ".join(prefix) or "none",
        "decoder": decoder,
        "LayerNorm eps": f"encoder {config.encoder_norm_eps:g}, decoder {config.decoder_norm_eps:g}",
        "position embedding": f"learned, resized {resizing}" if learned else resizing,
        "masks upsampled to": "padded size, then cropped" if config.upsample_to == "padded" else "image size",
        "mean": ", ".join(f"{value:g}" for value in config.mean),
        "std": ", ".join(f"{value:g}" for value in config.std),
        "classes": f"{config.num_classes}: {', '.join(config.class_names) or 'no names'}",
        "palette": "its own" if config.palette else "none; a default is generated",
    }
