"""A Segmenter of PyTorch's own operators for one image size, which exporters can trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels, vit
from .config import Pair
from .decoders import MaskTransformer, upsampled_size
from .segmenter import Segmenter


class ExportableSegmenter(nn.Module):
    """A copy of a Segmenter for images of one height and width, of PyTorch's own operators; see ``export``.

    Prefix tokens and learned positions are computed for this size once. Weights and activations have ``dtype``; class
    scores, their LayerNorm and the upsampling are float32, as in ``InferenceSegmenter``.
    """

    def __init__(self, model: Segmenter, size: Pair, output: str, uint8: bool, dtype: torch.dtype) -> None:
        super().__init__()
        config, patch = model.config, model.config.patch_size
        self.size, self.output, self.uint8 = size, output, uint8
        self.upsampled = upsampled_size(config, size)
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(1, -1, 1, 1)) for v in (config.mean, config.std))
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        encoder = self.model.encoder
        encoder.grid = -(-size[0] // patch), -(-size[1] // patch)
        encoder.config = config.replace(pos_embed_prefix=False)
        prefix, positions, _ = model.encoder.grid_embeddings(*encoder.grid)
        encoder.cls_token = nn.Parameter(prefix.to(dtype), requires_grad=False)
        encoder.dist_token = encoder.reg_token = None
        if positions is not None:
            encoder.pos_embed = nn.Parameter(positions.to(dtype), requires_grad=False)
        for name in {"head", "head_dist"} & encoder._modules.keys():
            delattr(encoder, name)
        for module in self.model.modules():
            if isinstance(module, vit.VisionTransformer):
                module.__class__ = _PlainVisionTransformer
            elif isinstance(module, vit.Attention):
                module.__class__ = _PlainAttention
            elif isinstance(module, MaskTransformer):
                module.__class__ = _PlainMaskTransformer
                module.mask_norm.float()

    def forward(self, images: Tensor) -> Tensor:
        if self.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        masks = self.model.masks(images).float()
        if self.output == "labels":
            return kernels.reference.upsample_argmax(masks, self.upsampled, self.size)
        if self.output == "logits":
            return kernels.reference.upsample(masks, self.upsampled, self.size, align_corners=False)
        return masks


def _bipartite_groups(
    value: Tensor, match: Tensor, tokens: int, merged: int, prefix: int = 0, threshold: float | None = None
) -> Tensor:
    """Groups of ``kernels.bipartite_groups`` by a number of sources, without a stable sort, which ONNX lacks.

    All sources above the last value that merges do, and the first ones of those that have it.
    """
    value = torch.where(value.isnan(), -torch.inf, value)
    bound = value.topk(merged, 1).values[:, -1:]
    above, equal = (value > bound).long(), (value == bound).long()
    merges = above + equal * (equal.cumsum(1) <= merged - above.sum(1, keepdim=True))
    ones = torch.ones_like(value[:, :1], dtype=torch.int64).expand(-1, prefix + tokens)
    index = torch.cat([ones[:, :prefix], _interleaved(ones[:, : (tokens + 1) // 2], 1 - merges)], 1).cumsum(1) - 1
    destinations = index[:, prefix::2]
    sources = torch.where(merges == 1, destinations.gather(1, match), index[:, prefix + 1 :: 2])
    return torch.cat([index[:, :prefix], _interleaved(destinations, sources)], 1)


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """``(B, n)``, and ``(B, n)`` or one less -> both in turns."""
    pairs = torch.stack([even, F.pad(odd, (0, even.shape[1] - odd.shape[1]))], 2)
    return pairs.flatten(1)[:, : even.shape[1] + odd.shape[1]]


class _PlainVisionTransformer(vit.VisionTransformer):
    ops = SimpleNamespace(**{**vars(kernels.reference), "bipartite_groups": _bipartite_groups})


class _PlainAttention(vit.Attention):
    def forward(self, x: Tensor, rotation: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.packed_qkv(x, rotation).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class _PlainMaskTransformer(MaskTransformer):
    def forward(self, patches: Tensor, bias: Tensor | None = None) -> Tensor:
        patches, classes = self.projected(patches, bias)
        norm = self.mask_norm
        return kernels.reference.mask_scores(patches.float(), classes.float(), norm.weight, norm.bias, norm.eps)
