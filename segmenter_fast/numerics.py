"""Whose numerics a configuration has: programs differ where the weights do not show it."""

from __future__ import annotations

from .config import SegmenterConfig

# (encoder eps, decoder eps, resizing of the position embedding, size that masks are upsampled to)
_PROGRAMS: dict[tuple[float, float, str, str], str] = {
    (1e-5, 1e-5, "bilinear", "padded"): "the official program",
    (1e-6, 1e-5, "bicubic", "image"): "mmsegmentation",
    (1e-6, 1e-5, "bicubic_antialias", "padded"): "timm in the encoder, the official program in the decoder",
    (1e-5, 1e-5, "rotary", "padded"): "timm in the encoder, the official program in the decoder",
}


def program_of(config: SegmenterConfig) -> str:
    """The program that computes as the configuration says, in words."""
    positions = "rotary" if config.pos_embed_kind == "rotary" else config.pos_embed_mode
    numerics = (config.encoder_norm_eps, config.decoder_norm_eps, positions, config.upsample_to)
    return _PROGRAMS.get(numerics, "no program we know")
