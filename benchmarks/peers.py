"""The whole-model peers that ours is compared with; ``ReferenceSegmenter`` itself is the first of them.

Peer 1: the official arithmetic as shipped: eager, float32, attention matrix and full-size logits materialised.
Peer 2: the same model with PyTorch's own means: scaled_dot_product_attention, low-precision weights, torch.compile.
"""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from segmenter_fast.reference import Attention, ReferenceSegmenter, Rotation


class SdpaAttention(Attention):
    """The oracle's attention through ``scaled_dot_product_attention``, by ``backend`` or as it chooses itself."""

    backend: SDPBackend | None = None

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        with contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, dim))


def with_sdpa(
    reference: ReferenceSegmenter, dtype: torch.dtype, backend: SDPBackend | None = None
) -> ReferenceSegmenter:
    """Peer 2 before it is compiled: a copy of the oracle in ``dtype`` whose attention is SDPA's."""
    peer = copy.deepcopy(reference).to(dtype)
    for module in peer.modules():
        if isinstance(module, Attention):
            module.__class__ = SdpaAttention
            assert isinstance(module, SdpaAttention)
            module.backend = backend
    return peer
