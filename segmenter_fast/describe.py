"""Models in words and numbers, for ``segmenter-fast info`` and ``variants`` and for model cards."""

from __future__ import annotations

import math
from dataclasses import asdict

from rich.table import Table

from .config import PUBLISHED_MIOU, VARIANTS, SegmenterConfig

# Programs by their numerics: encoder eps, decoder eps, resizing of positions or "rotary", size of the upsampled masks.
_PROGRAMS = {
    (1e-5, 1e-5, "bilinear", "padded"): "the official program",
    (1e-6, 1e-5, "bicubic", "image"): "mmsegmentation",
    (1e-6, 1e-5, "bicubic_antialias", "padded"): "timm in the encoder, the official program in the decoder",
    (1e-6, 1e-5, "bicubic_grid", "padded"): "Hugging Face in the encoder, the official program in the decoder",
    (1e-12, 1e-5, "bicubic_grid", "padded"): "Hugging Face in the encoder, the official program in the decoder",
    (1e-6, 1e-5, "bicubic_offset", "padded"): "Meta's DINOv2 in the encoder, the official program in the decoder",
    (1e-5, 1e-5, "rotary", "padded"): "timm in the encoder, the official program in the decoder",
}


def _linear(inputs: int, outputs: int, bias: bool = True) -> tuple[int, int]:
    """Return parameters, and multiply-accumulates for one token, of a linear layer."""
    return inputs * outputs + bias * outputs, inputs * outputs


def _block(config: SegmenterConfig, encoder: bool, tokens: int) -> tuple[int, int]:
    """Return parameters, and multiply-accumulates for ``tokens`` tokens, of one transformer layer."""
    dim, hidden = config.embed_dim, int(config.mlp_ratio * config.embed_dim)
    layers = [_linear(dim, 3 * dim, config.qkv_bias or not encoder), _linear(dim, dim)]
    if encoder and config.mlp == "swiglu":
        hidden = math.ceil(hidden / 8) * 8
        layers.append(_linear(dim, hidden))
    layers += [_linear(dim, hidden), _linear(hidden, dim)]
    parameters, macs = (sum(counts) for counts in zip(*layers, strict=True))
    vectors = 6 if encoder and config.layer_scale else 4  # of the norms and the layer scale
    return parameters + vectors * dim, tokens * macs + 2 * tokens**2 * dim


def _costs(config: SegmenterConfig, size: int) -> tuple[int, int]:
    """Return parameters, and multiply-accumulates for one square image of ``size`` pixels."""
    dim, classes, prefix = config.embed_dim, config.num_classes, config.num_prefix_tokens
    patches = math.ceil(size / config.patch_size) ** 2
    kernel = config.in_channels * config.patch_size**2 * dim
    parameters, macs = kernel + dim + prefix * dim + 2 * dim, patches * kernel
    if config.pos_embed_kind == "learned":
        parameters += (prefix * config.pos_embed_prefix + config.grid[0] * config.grid[1]) * dim
    parameters += config.head_classes * (dim + 1) * (1 + config.distillation_token)
    merging = config.merging
    left = merging.tokens_left(patches, config.depth) if merging else [patches] * config.depth
    for layer, (before, after) in enumerate(zip([patches, *left], left, strict=False)):
        if merging and after < before and (merging.matching == "bipartite" or layer > merging.layers[0]):
            macs += before // 2 * ((before + 1) // 2) * min(merging.channels or dim, dim)
    stacks, groups = [(1, _block(config, True, tokens + prefix)) for tokens in left], left[-1]
    if config.decoder == "mask":
        stacks.append((config.decoder_depth, _block(config, False, groups + classes)))
        parameters += 3 * dim * dim + dim + classes * dim + 2 * dim + 2 * classes
        macs += (2 * groups + classes) * dim * dim
    else:
        parameters += (dim + 1) * classes
    for depth, (more, macs_of_block) in stacks:
        parameters, macs = parameters + depth * more, macs + depth * macs_of_block
    return parameters, macs + groups * dim * classes


def count_parameters(config: SegmenterConfig) -> int:
    """Return the number of values in all parameters of a model."""
    return _costs(config, 1)[0]


def count_macs(config: SegmenterConfig, size: int = 512) -> int:
    """Multiply-accumulates of the matrix products for one square image of ``size`` pixels, up to the masks.

    Those of the plain PyTorch model, without softmax, norms and the like; with shares of token merging those of the
    tokens that are left, and of matching them. With a threshold, which depends on the image, as if none merged.
    """
    return _costs(config, size)[1]


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
        published = " / ".join(f"{value:.1f}" for value in PUBLISHED_MIOU.get(name, ()))
        size, macs = f"{count_parameters(config) / 1e6:.1f} M", f"{count_macs(config) / 1e9:.1f}"
        table.add_row(name, size, macs, published)
    return table


def info_table(config: SegmenterConfig, origin: str) -> Table:
    """Origin, costs and configuration of a model."""
    table = Table(title=origin, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    macs = f"{count_macs(config) / 1e9:.1f}"
    costs = {"parameters": f"{count_parameters(config):,}", "GMAC at 512 x 512": macs}
    if merging := config.merging:
        exact = f"{count_macs(config.replace(merging=None)) / 1e9:.1f} without merging"
        costs["GMAC at 512 x 512"] = f"fewer than the {exact}" if config.adaptive else f"{macs}, {exact}"
        fields = asdict(merging).items()
        costs["token merging"] = ", ".join(f"{name} {value}" for name, value in fields if value is not None)
        left = merging.tokens_left(math.ceil(512 / config.patch_size) ** 2, config.depth)
        costs |= {} if config.adaptive else {"patch tokens by layer": ", ".join(map(str, left))}
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
        "channels": str(config.in_channels) + (f": bands {', '.join(map(str, config.bands))}" if config.bands else ""),
        "value that stands for 1": f"{config.pixel_scale:g}" if config.pixel_scale else "255 of 8 bits, 65535 of 16",
        "mean": ", ".join(f"{value:g}" for value in config.mean),
        "std": ", ".join(f"{value:g}" for value in config.std),
        "classes": f"{config.num_classes}: {', '.join(config.class_names) or 'no names'}",
        "palette": "its own" if config.palette else "none; a default is generated",
    }
