"""The official program's module structure around the reference's weights: what users give to ``accelerate``.

Attention also returns its probabilities, the layer has a ``drop_path``, the decoder takes the size of the images.
Outputs and strides are the reference's.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast.reference import Attention, Block, MaskTransformer, ReferenceSegmenter


class OfficialLike(nn.Module):
    """``(B, 3, H, W)`` -> ``(B, K, H, W)`` logits. Shares the weights of a ``reference`` with a mask transformer.

    It has layers of its own, which ``accelerate`` may change.
    """

    def __init__(self, reference: ReferenceSegmenter) -> None:
        super().__init__()
        weights = (*reference.parameters(), *reference.buffers())
        reference = copy.deepcopy(reference, {id(weight): weight for weight in weights})
        self.encoder = reference.encoder
        self.encoder.blocks = _layers(self.encoder.blocks)
        self.patch_size = reference.config.patch_size
        assert isinstance(reference.decoder, MaskTransformer)
        self.decoder = _Decoder(reference.decoder, self.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        size = images.shape[2], images.shape[3]
        masks = F.interpolate(self.decoder(self.encoder(images), size), size=size, mode="bilinear")
        return masks[..., :height, :width]


class _Attention(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj
        self.scale = (attention.proj.in_features // attention.heads) ** -0.5

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.mT * self.scale).softmax(-1)
        return self.proj((probabilities @ v).transpose(1, 2).flatten(2)), probabilities


class _Layer(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path = block.norm1, _Attention(block.attn), nn.Identity()
        self.norm2, self.mlp = block.norm2, block.mlp

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask)[0])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Decoder(nn.Module):
    def __init__(self, decoder: MaskTransformer, patch_size: int) -> None:
        super().__init__()
        self.patch_size, self.n_cls = patch_size, decoder.cls_emb.shape[1]
        self.proj_dec, self.blocks = decoder.proj_dec, _layers(decoder.blocks)
        self.decoder_norm, self.mask_norm = decoder.decoder_norm, decoder.mask_norm
        self.cls_emb, self.proj_patch, self.proj_classes = decoder.cls_emb, decoder.proj_patch, decoder.proj_classes

    def forward(self, x: Tensor, im_size: tuple[int, int]) -> Tensor:
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(x.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.decoder_norm(x).split([x.shape[1] - self.n_cls, self.n_cls], 1)
        patches, classes = patches @ self.proj_patch, classes @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        scores = self.mask_norm(patches @ classes.mT)
        return scores.unflatten(1, (int(im_size[0] // self.patch_size), -1)).permute(0, 3, 1, 2)


def _layers(blocks: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(_Layer(block) for block in blocks.children() if isinstance(block, Block))
