"""Cases of token merging: the best match of every other token, the means of groups, attention with a bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference

from ..case import OURS, Case, Variant, compiled, judge_by
from ..device import name_of

# Patches of a grid and width: S-Mask/16, B-Mask/16 and S-Mask/8 at 512 pixels.
SHAPES = ((1024, 384), (1024, 768), (4096, 384))
SHARE = 0.08  # of the tokens that merge


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Cases of all three ops in the order of SHAPES."""
    dtypes, batches = ((torch.bfloat16,), (32, 1)) if device.type == "cuda" else ((torch.float32, torch.bfloat16), (1,))
    return [
        tokens_case(op, device, dtype, batch, *shape)
        for shape in SHAPES[: 1 if quick else None]
        for batch in batches
        for dtype in dtypes
        for op in OPS
    ]


def tokens_case(op: str, device: torch.device, dtype: torch.dtype, batch: int, tokens: int, dim: int) -> Case:
    """One op of OPS, by the reference, compiled and fused; attention also by PyTorch."""
    eager, ours, prepare, flops = OPS[op]
    variants: dict[str, Variant | str] = {
        name: Variant(call, prepare) for name, call in (("eager", eager), ("compile", compiled(eager)), (OURS, ours))
    }
    if op == "attention with a bias":
        variants["SDPA"] = Variant(_sdpa, prepare)
    return Case(
        parameters={"op": op, "tokens": tokens, "dim": dim, "batch": batch, "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, batch, tokens, dim, dtype),
        judge=judge_by(lambda *inputs: eager(*prepare(*inputs))),
        variants=variants,
        bytes_moved=batch * tokens * dim * dtype.itemsize * (4 if "attention" in op else 2),
        flops=int(batch * tokens**2 * dim * flops),
    )


def _inputs(batch: int, tokens: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Normalised tokens, a packed projection, the groups of the tokens and their sizes."""
    draw = partial(torch.randn, generator=generator, device=generator.device)
    z = F.normalize(draw(batch, tokens, dim) + draw(dim), dim=-1).to(dtype)
    qkv = draw(batch, tokens, 3, dim // 64, 64).to(dtype)
    value, match = reference.best_match(z[:, 1::2], z[:, ::2])
    index = reference.bipartite_groups(value, match, tokens, round(SHARE * tokens))
    sizes = torch.randint(1, 9, (batch, tokens), generator=generator, device=generator.device).float()
    return z, qkv, index, sizes


def _sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    mask = bias[:, None, None].to(qkv.dtype).expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).contiguous()


def _merge(function: Callable[..., tuple[Tensor, Tensor]], z: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return function(z, index, z.shape[1] - round(SHARE * z.shape[1]), sizes)[0]


# (reference, ours, arguments of both, FLOPs of matrix products in units of tokens^2 times width)
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., tuple[Any, ...]], float]] = {
    "best_match": (
        lambda a, b: reference.best_match(a, b)[0],
        lambda a, b: kernels.best_match(a, b)[0],
        lambda z, qkv, index, sizes: (z[:, 1::2], z[:, ::2]),
        0.5,
    ),
    "merge_tokens": (
        partial(_merge, reference.merge_tokens),
        partial(_merge, kernels.merge_tokens),
        lambda z, qkv, index, sizes: (z, index, sizes),
        0,
    ),
    "attention with a bias": (
        lambda qkv, bias: reference.attention(qkv, bias=bias),
        lambda qkv, bias: kernels.attention(qkv, bias=bias),
        lambda z, qkv, index, sizes: (qkv, sizes.log()),
        4,
    ),
}
