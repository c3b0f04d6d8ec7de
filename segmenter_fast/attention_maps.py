"""Attention probabilities of one layer, for people who look at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decoders import MaskTransformer
from .vit import Block

if TYPE_CHECKING:
    from .segmenter import Segmenter

# Scores of one chunk of queries: at most this many float32 values beside the result.
_CHUNK_VALUES = 1 << 24


@torch.no_grad()
def attention_maps(
    model: Segmenter, images: Tensor, layer: int, part: str = "encoder", queries: slice | None = None
) -> Tensor:
    """Softmax probabilities of every head of one layer, by the unfused path.

    Everything up to that layer runs as in the model's forward, with the fused attention.

    Args:
        model: in the mode (train or eval) that the maps are wanted for.
        images: ``(B, 3, H, W)``, as the model's forward takes them.
        layer: index into the layers of ``part``; negative ones count from the end.
        part: "encoder", whose tokens are the prefix tokens and the patches in row-major order, or "decoder" (mask
            transformer only), whose tokens are the patches and the class embeddings.
        queries: the tokens whose rows are wanted; all if not given. All rows of a large image take
            B x heads x N x N x 4 bytes: 0.8 GB for one 512 x 512 image of a ViT-B at patch size 8.

    Returns:
        ``(B, heads, queries, N)`` float32 (float64 for a float64 model); each row sums to 1.

    Raises:
        ValueError: another part, a layer that does not exist, or the decoder of a model with a linear one.
    """
    x, rotation = model.encoder.embed(model.padded(images))
    blocks = model.encoder.blocks
    if part == "decoder":
        if not isinstance(model.decoder, MaskTransformer):
            raise ValueError("part 'decoder' needs a mask transformer; the linear decoder has no attention")
        for block in blocks:
            x = block(x, rotation)
        x, rotation = model.decoder.tokens(model.encoder.patches(x)), None
        blocks = model.decoder.blocks
    elif part != "encoder":
        raise ValueError(f"part must be 'encoder' or 'decoder', got {part!r}")
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"layer must be in [{-len(blocks)}, {len(blocks)}) for the {part}, got {layer}")
    for block in blocks[: layer % len(blocks)]:
        x = block(x, rotation)
    block = blocks[layer]
    assert isinstance(block, Block)
    q, k, _ = block.attn.packed_qkv(block.norm1(x), rotation).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
    q = q[:, :, queries or slice(None)] * q.shape[-1] ** -0.5
    maps = q.new_empty((*q.shape[:3], k.shape[2]), dtype=q.dtype if q.dtype == torch.float64 else torch.float32)
    chunk = max(_CHUNK_VALUES // max(maps[:, :, :1].numel(), 1), 1)
    for rows, into in zip(q.split(chunk, 2), maps.split(chunk, 2), strict=True):
        torch.softmax((rows @ k.mT).to(maps.dtype), -1, out=into)
    return maps
