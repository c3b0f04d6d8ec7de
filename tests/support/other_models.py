"""Models of other libraries for ``accelerate``, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate.match import match_modules
from support.mmseg_lookalike import MmEncoderDecoder
from support.official_lookalike import OfficialSegmenter


def vit(name: str, **fields: object) -> nn.Module:
    size = 56 if "patch14" in name else 64
    return timm.create_model(name, **{"depth": 2, "img_size": size, "num_classes": 5, **fields})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "official": lambda: OfficialSegmenter(dropout=0.0),
    "mmseg": lambda: MmEncoderDecoder(drop_path=0.1),
    "mmseg_tokens_first": lambda: MmEncoderDecoder(batch_first=False),
    "vit_tiny": lambda: vit("vit_tiny_patch16_224"),
    "vit_small": lambda: vit("vit_small_patch16_224", drop_path_rate=0.2, proj_drop_rate=0.1),
    "vit_base": lambda: vit("vit_base_patch16_224", qkv_bias=False),
    "deit": lambda: vit("deit_tiny_distilled_patch16_224"),
    "dinov2_registers": lambda: vit("vit_small_patch14_reg4_dinov2"),
}
# One model per kind of fused module.
KINDS = ("official", "mmseg", "vit_tiny")


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose attention is far from uniform."""
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def images(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, *{"official": (50, 71), "dinov2_registers": (56, 56)}.get(name, (64, 64)), dtype=dtype)


def outputs_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, in the model's mode, with a fixed seed for its dropout."""
    torch.manual_seed(1)
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "images": x.grad, **grads}


class Plain(nn.Module):
    """The smallest attention that is recognised: two projections and a number of heads."""

    def __init__(self, dim: int = 64, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def zero(module: nn.Module) -> nn.Module:
    """The module with zeros for weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def assert_left(module: nn.Module, reason: str) -> None:
    """``accelerate`` leaves the module as a whole, for a reason that starts as given."""
    ((name, found, match),) = match_modules(module)
    assert (name, found) == ("", module)
    assert isinstance(match, str)
    assert match.startswith(reason)
    sf.accelerate(module)
    assert not sf.acceleration_report(module).replaced
    assert sf.acceleration_report(module).left[0].reason == match
