"""What is exported: a Segmenter for one image size as one module of PyTorch's own operators, none of ours."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels, vit
from .config import Pair
from .decoders import MaskTransformer
from .segmenter import Segmenter

OUTPUTS = ("labels", "masks", "logits")


class Program(nn.Module):
    """A copy of a Segmenter for images of one height and width, without the fused ops.

    Takes ``(B, 3, H, W)`` images: float32 and normalised, or with ``uint8`` RGB pixels as they are. Gives, by
    ``output``, "labels" ``(B, H, W)``, uint8 up to 256 classes and int32 above; "masks" ``(B, K, h, w)`` float32 scores
    of the patches of the zero-padded images; or "logits" ``(B, K, H, W)`` float32.

    A learned position embedding is the one for this size, so nothing is resized at run time. Weights and activations
    have ``dtype``; class scores, their LayerNorm and the upsampling are float32, as in ``InferenceSegmenter``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Segmenter, size: Pair, output: str, uint8: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.output, self.uint8 = size, output, uint8
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        encoder, patch = self.model.encoder, model.config.patch_size
        rows, columns = -(-size[0] // patch), -(-size[1] // patch)
        positions = model.encoder.positions(rows, columns)
        if positions is not None:
            encoder.pos_embed = nn.Parameter(positions.to(dtype), requires_grad=False)
        encoder.config = model.config.replace(image_size=(rows * patch, columns * patch))
        for name in ("head", "head_dist"):
            if hasattr(encoder, name):
                delattr(encoder, name)
        for block in self.model.modules():
            if isinstance(block, vit.Block):
                block.add_module("attn", _Attention(block.attn))
        if isinstance(self.model.decoder, MaskTransformer):
            self.model.add_module("decoder", _MaskTransformer(self.model.decoder))
        self.upsampled = (rows * patch, columns * patch) if model.config.upsample_to == "padded" else size
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(model.config, name)).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        masks = self.model.masks(images).float()
        if self.output == "labels":
            return kernels.reference.upsample_argmax(masks, self.upsampled, self.size)
        if self.output == "logits":
            return kernels.reference.upsample(masks, self.upsampled, self.size, align_corners=False)
        return masks


class _Attention(nn.Module):
    def __init__(self, fused: vit.Attention) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        q, k, v = self.fused.packed_qkv(x, rotation).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        return self.fused.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MaskTransformer(nn.Module):
    def __init__(self, fused: MaskTransformer) -> None:
        super().__init__()
        self.fused = fused
        fused.mask_norm.float()

    def forward(self, patches: Tensor) -> Tensor:
        fused, classes = self.fused, self.fused.cls_emb.shape[1]
        x = fused.tokens(patches)
        for block in fused.blocks:
            x = block(x)
        x = fused.decoder_norm(x)
        patches, embeddings = x[:, :-classes] @ fused.proj_patch, x[:, -classes:] @ fused.proj_classes
        norm = fused.mask_norm
        return kernels.reference.mask_scores(patches.float(), embeddings.float(), norm.weight, norm.bias, norm.eps)
