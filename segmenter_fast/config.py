"""Configuration of a Segmenter: one frozen dataclass, and one table of the named variants."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .field_types import did_you_mean, require, require_types
from .token_merging import TokenMerging

Pair = tuple[int, int]
Triple = tuple[float, float, float]

LARGEST_SCALE = 16
"""Largest factor that inference resizes an image by: a pixel then fills a patch of the paper's models."""

_CHOICES = {
    "decoder": ("mask", "linear"),
    "pos_embed_kind": ("learned", "rotary"),
    "pos_embed_mode": ("bilinear", "bicubic", "bicubic_grid", "bicubic_offset", "bicubic_antialias"),
    "mlp": ("gelu", "swiglu"),
    "upsample_to": ("padded", "image"),
}
_AT_LEAST_ONE = ("num_classes", "in_channels", "patch_size", "embed_dim", "depth", "num_heads", "decoder_num_heads")
_RATES = ("dropout", "drop_path_rate", "decoder_dropout", "decoder_drop_path_rate")
_POSITIVE = ("encoder_norm_eps", "decoder_norm_eps", "rope_temperature")


@dataclass(frozen=True)
class SegmenterConfig:
    """Architecture, numerics, preprocessing and classes of a model. ``create_model`` can override any field.

    Raises:
        ValueError: a field outside its range.
    """

    variant: str = "custom"
    num_classes: int = 150
    image_size: Pair = (512, 512)
    """(height, width) in pixels of the position embedding; it is resized for other sizes."""
    patch_size: int = 16

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    """Feed-forward layers of the encoder: "gelu", or "swiglu" (DINOv3 S+ and H+; hidden width a multiple of 8)."""
    qkv_bias: bool = True
    """Bias of the encoder's query, key and value projections (DINOv3: none)."""
    class_token: bool = True
    distillation_token: bool = False
    num_register_tokens: int = 0
    pos_embed_kind: str = "learned"
    """Position embedding: "learned", added to the tokens, or "rotary", rotated queries and keys (DINOv3)."""
    rope_temperature: float = 100.0
    """Longest period of the rotary embedding, in half image sides."""
    pos_embed_prefix: bool = True
    """The position embedding has entries for the prefix tokens (DINOv2 with registers: no)."""
    pos_embed_mode: str = "bilinear"
    """Resizing of a learned position embedding: "bilinear" (official) or "bicubic" (mmsegmentation) for another number
    of patches; for another grid "bicubic_grid" (Hugging Face), "bicubic_offset" (Meta's DINOv2: scale factors for 0.1
    patches more) or "bicubic_antialias" (timm, and all DINOv2 with registers)."""
    layer_scale: bool = False
    encoder_norm_eps: float = 1e-5
    dropout: float = 0.0
    drop_path_rate: float = 0.1
    """Stochastic depth of the last encoder layer; it rises linearly from 0 at the first."""
    head_classes: int = 0
    """Classes of the unused classification heads in official checkpoints; 0 for none."""
    merging: TokenMerging | None = None
    """Merging of patch tokens that are alike; also given as ``TokenMerging.of`` takes it. None: exact."""

    decoder: str = "mask"
    """Decoder: "mask" (mask transformer) or "linear"."""
    decoder_depth: int = 2
    decoder_num_heads: int = 12
    decoder_norm_eps: float = 1e-5
    decoder_dropout: float = 0.0
    decoder_drop_path_rate: float = 0.0

    upsample_to: str = "padded"
    """Size that masks are upsampled to: "padded", then cropped (official), or "image", directly (mmsegmentation)."""
    in_channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel (RGB where there are three), of pixels scaled to [0, 1]."""
    bands: tuple[int, ...] = ()
    """Bands of an image file that are the channels, counted from 1; empty: the file's colours, or all its bands."""
    pixel_scale: float | None = None
    """Value in an image file that stands for 1; None: 255 for 8 bits, 65535 for 16."""
    window_size: int = 512
    window_stride: int = 512
    upscale_small_images: bool = True
    """Sliding-window inference enlarges an image with a side below the window (official: yes)."""

    timm_backbone: str | None = None
    """Name of the timm weights to start training from."""
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    """RGB per class, 0 to 255; empty where unknown."""
    label_values: tuple[int, ...] = ()
    """Value of each class in label files, 0 to 255; empty where it is the class itself."""

    def __post_init__(self) -> None:
        if self.merging is not None:
            object.__setattr__(self, "merging", TokenMerging.of(self.merging, self.depth))
        require_types(self)
        for name, allowed in _CHOICES.items():
            given = getattr(self, name)
            require(given in allowed, name, repr(given), f"one of {', '.join(allowed)}")
        for name in _AT_LEAST_ONE:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("decoder_depth", "num_register_tokens", "head_classes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in _RATES:
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in _POSITIVE:
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("num_heads", "decoder_num_heads") if self.decoder == "mask" else ("num_heads",):
            fits = self.embed_dim % getattr(self, name) == 0
            require(fits, name, getattr(self, name), f"a divisor of embed_dim, which is {self.embed_dim}")
        if self.pos_embed_kind == "rotary":
            fits = self.embed_dim // self.num_heads % 4 == 0
            require(fits, "num_heads", self.num_heads, "such that rotary heads have a multiple of 4 channels")
        fits = len(self.image_size) == 2 and min(self.image_size) >= self.patch_size
        require(fits, "image_size", self.image_size, f"(height, width), each at least one patch of {self.patch_size}")
        fits = self.window_size >= self.patch_size and self.window_stride >= 1
        given = (self.window_size, self.window_stride)
        require(fits, "window_size, window_stride", given, f"at least one patch of {self.patch_size}, and at least 1")
        count = self.in_channels
        for name in ("mean", "std"):
            given = getattr(self, name)
            require(len(given) == count, name, given, f"{count} numbers, as in_channels is {count}")
        require(min(self.std) > 0, "std", self.std, "positive")
        fits = not self.bands or (len(self.bands) == count and min(self.bands) >= 1)
        require(fits, "bands", self.bands, f"empty, or {count} bands counted from 1, as in_channels is {count}")
        require(self.pixel_scale is None or self.pixel_scale > 0, "pixel_scale", self.pixel_scale, "positive")
        for name in ("class_names", "palette", "label_values"):
            fits = len(getattr(self, name)) in (0, self.num_classes)
            require(fits, name, f"{len(getattr(self, name))} entries", f"empty or num_classes={self.num_classes} long")
        fits = len(set(self.label_values) & set(range(256))) == len(self.label_values)
        require(fits, "label_values", self.label_values, "different numbers, each 0 to 255")

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation and register tokens, which precede the patches."""
        return self.class_token + self.distillation_token + self.num_register_tokens

    @property
    def grid(self) -> Pair:
        """(rows, columns) of patches of the position embedding."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def adaptive(self) -> bool:
        """True if the number of tokens depends on the content of images, as a threshold of merging makes it."""
        return self.merging is not None and self.merging.threshold is not None

    def replace(self, **fields: Any) -> SegmenterConfig:
        """Return a copy with other values for some fields.

        An int ``image_size`` is a square. A new class count drops class names, palette and label values. Another
        ``in_channels`` drops the bands, and repeats mean and std in turn, or averages them for one channel.

        Raises:
            TypeError: an unknown field.
        """
        if fields.get("num_classes", self.num_classes) != self.num_classes:
            fields = {"class_names": (), "palette": (), "label_values": (), **fields}
        count = fields.get("in_channels", self.in_channels)
        if count != self.in_channels and isinstance(count, int):
            repeated = {name: _for_channels(getattr(self, name), count) for name in ("mean", "std")}
            fields = {**repeated, "bands": (), **fields}
        return self.from_dict({**vars(self), **fields})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; without ``merging`` where there is none."""
        return {name: value for name, value in dataclasses.asdict(self).items() if (name, value) != ("merging", None)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SegmenterConfig:
        """The inverse of ``to_dict``; absent fields take their defaults, an int ``image_size`` is a square.

        Raises:
            TypeError: an unknown field.
            ValueError: a field outside its range.
        """
        known = cls.__dataclass_fields__.keys()
        if unknown := sorted(fields.keys() - known):
            raise TypeError(
                f"unknown configuration field {', '.join(unknown)[:200]}; known are {', '.join(sorted(known))}"
            )
        if isinstance(fields.get("image_size"), int):
            fields = {**fields, "image_size": (fields["image_size"],) * 2}
        return cls(**{name: _frozen(value) for name, value in fields.items()})


def _for_channels(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return numbers of other channels for ``count`` channels, as ``adapt_channels`` takes their weights."""
    return (sum(values) / len(values),) if count == 1 else tuple(values[i % len(values)] for i in range(count))


def _frozen(value: Any) -> Any:
    """Turn lists, nested ones too, into tuples: JSON has no tuples."""
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

# By size: name, embed_dim, depth, num_heads.
_BACKBONES = {
    "m": ("mini", 128, 4, 2),  # not in the paper: small images, trained from scratch on a CPU in minutes
    "t": ("tiny", 192, 12, 3),
    "s": ("small", 384, 12, 6),
    "b": ("base", 768, 12, 12),
    "l": ("large", 1024, 24, 16),
}
# By size, patch size and family: the weights in timm that the paper starts from, or the most similar ones.
_TIMM = {
    **{(size, 16, ""): f"vit_{_BACKBONES[size][0]}_patch16_384.augreg_in21k_ft_in1k" for size in "tsbl"},
    **{(size, 32, ""): f"vit_{_BACKBONES[size][0]}_patch32_384.augreg_in21k_ft_in1k" for size in "sb"},
    ("l", 32, ""): "vit_large_patch32_384.orig_in21k_ft_in1k",
    **{key: None for key in (("m", 8, ""), ("t", 32, ""), ("t", 8, ""))},
    ("s", 8, ""): "vit_small_patch8_224.dino",
    ("b", 8, ""): "vit_base_patch8_224.augreg_in21k_ft_in1k",
    **{(size, 16, "deit"): f"deit_{_BACKBONES[size][0]}_distilled_patch16_224.fb_in1k" for size in "ts"},
    ("b", 16, "deit"): "deit_base_distilled_patch16_384.fb_in1k",
    **{(size, 14, "dinov2"): f"vit_{_BACKBONES[size][0]}_patch14_reg4_dinov2.lvd142m" for size in "sbl"},
    **{(size, 16, "dinov3"): f"vit_{_BACKBONES[size][0]}_patch16_dinov3.lvd1689m" for size in "sbl"},
}
# Fields of each family of backbones. DINOv2 and DINOv3 have the numerics of their implementations in timm.
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_REGISTERS = {"num_register_tokens": 4, "layer_scale": True, **_IMAGENET}
_FAMILIES: dict[str, dict[str, Any]] = {
    "": {},
    "deit": {"distillation_token": True, **_IMAGENET},
    "dinov2": {
        "pos_embed_prefix": False,
        "pos_embed_mode": "bicubic_antialias",
        "encoder_norm_eps": 1e-6,
        **_REGISTERS,
    },
    "dinov3": {"pos_embed_kind": "rotary", "pos_embed_prefix": False, "qkv_bias": False, **_REGISTERS},
}


def _variant(size: str, patch_size: int, family: str, decoder: str) -> SegmenterConfig:
    _, embed_dim, depth, num_heads = _BACKBONES[size]
    side = 518 if family == "dinov2" else 640 if size == "l" and not family else 512
    return SegmenterConfig(
        variant="_".join(part for part in ("seg", size, family, decoder, str(patch_size)) if part),
        image_size=(side, side),
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        decoder=decoder,
        decoder_num_heads=num_heads,
        window_size=side,
        window_stride=side,
        timm_backbone=_TIMM[size, patch_size, family],
        **_FAMILIES[family],
    )


VARIANTS: dict[str, SegmenterConfig] = {
    config.variant: config for config in (_variant(*key, decoder) for key in _TIMM for decoder in ("mask", "linear"))
}

# ADE20K validation mIoU, single and multiple scales, in percent, as the paper's authors report it (tables 1, 3, 6).
PUBLISHED_MIOU: dict[str, tuple[float, float]] = {
    "seg_t_mask_16": (38.1, 38.8),
    "seg_s_mask_16": (45.3, 46.9),
    "seg_b_mask_16": (48.5, 50.0),
    "seg_b_linear_8": (49.5, 50.5),
    "seg_l_mask_16": (51.8, 53.6),
    "seg_b_deit_linear_16": (47.1, 48.1),
    "seg_b_deit_mask_16": (48.7, 50.1),
}


def variant_config(name: str) -> SegmenterConfig:
    """The configuration of a named variant.

    Raises:
        ValueError: an unknown variant; the message names the most similar one, or lists the known ones.
    """
    if name not in VARIANTS:
        hint = did_you_mean(name, VARIANTS) or f"; known are {', '.join(VARIANTS)}"
        raise ValueError(f"unknown variant {name!r}{hint}")
    return VARIANTS[name]
