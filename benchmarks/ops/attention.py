"""Cases of fused attention: packed projection in, ``(B, N, H, D)`` out, as a ViT block needs it.

Every peer starts from the packed ``(B, N, 3, H, D)`` and ends contiguous; copies that its kernel forces count for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from segmenter_fast import kernels
from segmenter_fast.kernels import reference

from ..case import OURS, Case, Variant, relative_error
from ..device import name_of

HEADS, HEAD_DIM = 12, 64
# Tokens -> the batch that fills a large GPU at that length.
FILLING = {1025: 32, 4097: 8, 577: 64, 257: 128, 2305: 16, 1601: 16, 16385: 2}
BACKENDS = {
    "SDPA default": None,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
# Optional peers: the package that must be installed, and its attention on a packed projection.
PACKAGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "xformers": ("xformers", lambda qkv: import_module("xformers.ops").memory_efficient_attention(*qkv.unbind(2))),
    "flash-attn": ("flash_attn", lambda qkv: import_module("flash_attn").flash_attn_qkvpacked_func(qkv)),
}
ONLY_GPU = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Queries of one step of the oracle.
CHUNK = 1024


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Cases of attention. A CPU is full at batch 1 and measures that alone."""
    passes = ("forward", "backward")
    make = partial(attention_case, device)
    if device.type == "cpu":
        dtypes = (torch.float32, torch.bfloat16)
        lengths = (257, 1025) if quick else sorted(FILLING)
        return [make(dtype, 1, tokens, pass_) for tokens in lengths for pass_ in passes for dtype in dtypes]
    low = torch.bfloat16
    if quick:
        return [make(low, FILLING[tokens], tokens, pass_) for tokens in (1025, 4097) for pass_ in passes]
    full = [make(low, batch, tokens, pass_) for tokens, batch in FILLING.items() for pass_ in passes]
    single = [make(low, 1, tokens, pass_) for tokens in FILLING for pass_ in passes]
    return full + single + [make(torch.float16, FILLING[tokens], tokens, "forward") for tokens in (1025, 4097)]


def attention_case(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, pass_: str) -> Case:
    backward = pass_ == "backward"
    wrap = _backward if backward else _forward
    # Peers that materialise hold the scores and the probabilities, backward their gradients, too.
    scores = batch * HEADS * tokens**2 * dtype.itemsize * (3 if backward else 2)
    variants: dict[str, Variant | str] = {"eager": wrap(reference.attention, scores)}
    for name, backend in BACKENDS.items():
        if device.type == "cpu" and backend in ONLY_GPU:
            variants[name] = "PyTorch has no such backend on a CPU"
        else:
            variants[name] = wrap(partial(_sdpa, backend), scores if backend is SDPBackend.MATH else 0)
    for name, (package, call) in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            variants[name] = f"{package} is not installed"
        else:
            variants[name] = "it has no kernel for a CPU" if device.type == "cpu" else wrap(call)
    variants[OURS] = wrap(kernels.attention)
    element = batch * tokens * HEADS * HEAD_DIM * dtype.itemsize
    parameters = {"op": "attention", "pass": pass_, "tokens": tokens, "batch": batch, "heads": HEADS}
    return Case(
        parameters=parameters | {"head_dim": HEAD_DIM, "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, (batch, tokens, 3, HEADS, HEAD_DIM), dtype),
        judge=partial(_judge, backward),
        variants=variants,
        # Forward: q, k, v and the output. Backward: these four and the output's gradient in, three gradients out.
        bytes_moved=element * (8 if backward else 4),
        # Two matrix products forward; the backward pass computes one again and four new ones.
        flops=(10 if backward else 4) * batch * HEADS * tokens**2 * HEAD_DIM,
    )


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The packed projection, and the gradient of the output."""
    qkv = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    return qkv, torch.randn((*shape[:2], *shape[3:]), generator=generator, device=generator.device).to(dtype)


def _forward(function: Callable[[Tensor], Tensor], needs_bytes: int = 0) -> Variant:
    return Variant(function, lambda qkv, grad: (qkv,), needs_bytes)


def _backward(function: Callable[[Tensor], Tensor], needs_bytes: int = 0) -> Variant:
    """The gradient of the packed projection alone; the forward pass is preparation."""

    def prepare(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = qkv.detach().requires_grad_()
        return function(leaf), leaf, grad

    def run(out: Tensor, leaf: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

    return Variant(run, prepare, needs_bytes)


def _sdpa(backend: SDPBackend | None, qkv: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, D); the backward of unbind is one copy
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def _judge(backward: bool, inputs: tuple[Tensor, Tensor]) -> Callable[[Tensor], float]:
    """Error of the first head of the first image and the last head of the last image; heads are independent."""
    qkv, grad = inputs
    oracles = {(b, h): attention_oracle(qkv[b, :, :, h], grad[b, :, h], backward) for b, h in ((0, 0), (-1, -1))}
    expected = qkv.shape if backward else grad.shape

    def error(output: Tensor) -> float:
        if output.shape != expected or not output.isfinite().all():
            return float("inf")
        return max(relative_error(output[b, ..., h, :], oracle) for (b, h), oracle in oracles.items())

    return error


def attention_oracle(qkv: Tensor, grad_out: Tensor, backward: bool) -> Tensor:
    """Float64 for one head: ``(N, 3, D), (N, D)`` -> the output ``(N, D)``, or the gradient ``(N, 3, D)``."""
    packed = qkv.double().requires_grad_(backward)
    q, k, v = packed.unbind(1)
    outputs, grad = [], torch.zeros_like(packed)
    for start in range(0, q.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        out = (q[rows] @ k.mT * q.shape[1] ** -0.5).softmax(-1) @ v
        if backward:
            grad += torch.autograd.grad(out, packed, grad_out[rows].double(), retain_graph=True)[0]
        outputs.append(out.detach())
    return grad if backward else torch.cat(outputs)
