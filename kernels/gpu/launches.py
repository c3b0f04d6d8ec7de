"""Launches of every kernel with representative tensors, recorded instead of run: what ``aot`` compiles.

Triton itself binds and specialises the arguments, under a driver that stands for a GPU of the wanted architecture, and
gives a hook what it would compile. The tensors are on the meta device: nothing is allocated or computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ..loss_options import LossOptions
from ..registry import HEAD_SIZES
from .attention_backward import attention_backward
from .attention_forward import attention_forward
from .best_match import best_match
from .bipartite_groups import bipartite_groups
from .lattice import lattice_softmax
from .lattice_argmax import lattice_argmax
from .mask_scores import mask_scores, mask_scores_backward
from .merge_tokens import merge_tokens, merge_tokens_backward
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import pixel_backward, scale_gradient, upsample_cross_entropy
from .upsample_softmax import upsample_softmax
from .upsample_softmax_backward import upsample_softmax_backward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
BATCH, HEADS, GRID = 8, 12, 32

empty = partial(torch.empty, device="meta")


class Launch(NamedTuple):
    """A kernel and what Triton compiles it for, in the terms of ``triton.compiler.ASTSource``; and how it is called."""

    name: str
    kernel: Any
    signature: dict[str, Any]  # argument -> type, nested for tuples; "constexpr" where the value is compiled in
    constants: dict[tuple[int, ...], Any]  # position -> value
    attributes: dict[tuple[int, ...], Any]  # position -> divisibility and the like
    options: dict[str, int]
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # as given, options included

    @property
    def build(self) -> tuple[Any, ...]:
        """Everything that decides the machine code."""
        return self.kernel, self.signature, self.constants, self.attributes, self.options

    def compile(self, target: GPUTarget) -> Any:
        """The compiled kernel, as the launch would compile it."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options=self.options)


def stand_in(target: GPUTarget) -> Any:
    """A driver for Triton that stands for a GPU of the wanted architecture."""
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"{target.backend} {target.arch}",
        get_current_stream=lambda device: 0,
    )


def bind(target: GPUTarget, calls: Iterator[tuple[str, Callable[[], object]]]) -> list[Launch]:
    """All launches of labelled ``calls`` on a GPU that is ``target``, in order."""
    found: list[Launch] = []
    call: list[Any] = []  # label, grid, arguments

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
        call[1:] = grid, arguments
        return run(kernel, *args, grid=grid, warmup=warmup, **arguments)

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(_launch(fn.jit_function, compile, *call))
        return True  # Triton then neither compiles nor launches

    run = JITFunction.run
    precision = torch.backends.cuda.matmul.fp32_precision
    triton.runtime.driver.set_active(stand_in(target))
    try:
        with triton.knobs.runtime.scope(), mock.patch.object(JITFunction, "run", note):
            triton.knobs.runtime.jit_cache_hook = keep
            for label, function in calls:
                call[:] = (label,)
                function()
    finally:
        triton.runtime.driver.set_active(None)  # Triton finds its own driver again at the next launch
        torch.backends.cuda.matmul.fp32_precision = precision
    return found


def record(target: GPUTarget, calls: Iterator[tuple[str, Callable[[], object]]]) -> list[Launch]:
    """As ``bind``, but each build once.

    Raises:
        ValueError: two different builds have one name.
    """
    found: dict[str, Launch] = {}
    for launch in bind(target, calls):
        found.setdefault(repr(launch.build), launch)
    names = [launch.name for launch in found.values()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"different builds for {target} have one name: {', '.join(sorted(twice))}")
    return list(found.values())


def _launch(kernel: Any, bound: dict[str, Any], label: str, grid: Any, arguments: dict[str, Any]) -> Launch:
    """Launch from the arguments of Triton's hook, named by kernel, call and tile (blocks, warps, stages)."""
    options = {"num_warps": bound["num_warps"], "num_stages": bound["num_stages"]}
    told = {name: arguments[name] for name in ("maxnreg",) if name in arguments}  # the hook does not tell it
    options |= told | ({} if arguments.get("enable_fp_fusion", True) else {"enable_fp_fusion": False})
    constants = {kernel.arg_names[path[0]]: value for path, value in bound["constants"].items()}
    tile = [value for name, value in constants.items() if name.startswith("BLOCK")]
    name = f"{kernel.__name__.removesuffix('_kernel')} {label} {(*tile, *options.values())}"
    build = bound["signature"], bound["constants"], bound["configs"][0], options
    return Launch(name, kernel, *build, tuple(grid), arguments)


def representative_calls(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """A label and a call of a launcher, for every op, dtype, layout and tile configuration that ships.

    sm_75 has no attention, which PyTorch computes there, and float16 in place of bfloat16, which it lacks. Chips that
    share the tiles of others have a part of attention's builds.
    """
    half = "fp16" if arch == "sm_75" else "bf16"
    if arch != "sm_75":
        yield from _attention(arch not in ("sm_86", "sm_89", "sm_120", "gfx950"))
    yield from _lattice()
    yield from _mask_scores(half)
    yield from _tokens(half)
    yield from _upsample_argmax(half)
    yield from _upsample_softmax(half)
    yield from _upsample_cross_entropy(half)


def _attention(all_sizes: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls with a positive scale; a negative one would only negate the queries.

    2^k + 1 tokens, few and many; head sizes 64 and 128 also with a rest that takes a whole masked block.
    """
    for name in ("bf16", "fp16", "fp32") if all_sizes else ("bf16", "fp32"):
        for dim in HEAD_SIZES if all_sizes else (64, 128):
            for seq_len, rest in ((257, ""), (4097, ""), (280, " ragged"), (4152, " ragged")):
                if rest and (dim not in (64, 128) or name == "fp16"):
                    continue
                qkv = empty(BATCH, seq_len, 3, HEADS, dim, dtype=DTYPES[name])
                out, lse = empty(BATCH, seq_len, HEADS, dim, dtype=qkv.dtype), empty(BATCH, HEADS, seq_len)
                for precision in ("ieee", "tf32") if name == "fp32" else ("ieee",):
                    torch.backends.cuda.matmul.fp32_precision = precision
                    label = f"D={dim} {name} {precision}{rest}"
                    yield label, partial(attention_forward, qkv, 0.125, False)
                    yield f"{label} lse", partial(attention_forward, qkv, 0.125, True)
                    yield label, partial(attention_backward, out, qkv, out, lse, 0.125)
                    if not rest:  # merged tokens
                        bias = empty(BATCH, seq_len)
                        yield f"{label} bias", partial(attention_forward, qkv, 0.125, False, bias)
                        yield f"{label} lse bias", partial(attention_forward, qkv, 0.125, True, bias)
                        yield f"{label} bias", partial(attention_backward, out, qkv, out, lse, 0.125, bias)
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def _lattice() -> Iterator[tuple[str, Callable[[], object]]]:
    cases = [(2, "fp32", ""), (150, "fp32", ""), (1000, "fp32", ""), (150, "fp64", "")]
    for num_classes, name, groups in (*cases, (150, "fp32", " groups"), (150, "fp64", " groups")):
        scores = empty(600 if groups else 4096, num_classes, dtype=DTYPES[name])
        points = empty(4096, dtype=torch.int64) if groups else None

        def lattice(count: int, scores: Tensor = scores, points: Tensor | None = points) -> tuple[Any, ...]:
            index, weights = empty(count, 2, 512, dtype=torch.int64), empty(count, 512, dtype=scores.dtype)
            return scores, index, weights, index, weights, points

        label = f"K={num_classes} {name}{groups}"
        yield label, partial(lattice_softmax, *lattice(2))
        yield f"of one {label}", partial(lattice_argmax, *lattice(1))
        yield f"of votes {label}", partial(lattice_argmax, *lattice(2))


def _mask_scores(half: str) -> Iterator[tuple[str, Callable[[], object]]]:
    cases = [(name, num_classes) for name in (half, "fp32") for num_classes in (19, 150, 1000)]
    for name, num_classes in dict.fromkeys((*cases, ("fp16", 150))):
        like = partial(empty, dtype=DTYPES[name])
        patches, classes = like(BATCH, GRID**2, 768), like(BATCH, num_classes, 768)
        grad, norm = like(BATCH, GRID**2, num_classes), like(num_classes)
        label = f"K={num_classes} {name}"
        yield label, partial(mask_scores, patches, classes, norm, norm, 1e-5)
        yield label, partial(mask_scores_backward, grad, patches, classes, norm, norm, 1e-5)


def _tokens(half: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Tokens of ViT-Tiny, ViT-Small and ViT-Large, sums of channels; merging also of angles of rotary positions."""
    dtypes = (half, "fp16", "fp32") if half == "bf16" else (half, "fp32")
    for name, dim in itertools.product(dtypes, (128, 192, 384, 1024)):
        for images, tokens in ((BATCH, 1024), (BATCH, 16384)):
            both = empty(images, tokens, dim, dtype=DTYPES[name])
            a, b, label = both[:, 1::2], both[:, ::2], f"D={dim} {name}"
            yield label, partial(best_match, a, b, None)
            yield f"{label} ragged", partial(best_match, a, b, empty(images, dtype=torch.int64))
    value, match = empty(BATCH, 512), empty(BATCH, 512, dtype=torch.int64)
    yield "", partial(bipartite_groups, value, match, 1025, 80, 1, None)
    yield "above a threshold", partial(bipartite_groups, value, match, 1025, None, 1, 0.9)
    value, match = empty(BATCH, 8192), empty(BATCH, 8192, dtype=torch.int64)
    yield "many", partial(bipartite_groups, value, match, 16384, 800, 1, None)
    for name, dim in ((half, 384), ("fp32", 384), ("fp32", 1024), ("fp32", 66)):
        x, index = empty(BATCH, 1025, dim, dtype=DTYPES[name]), empty(BATCH, 1025, dtype=torch.int64)
        for weights in (None, empty(BATCH, 1025)):
            label = f"D={dim} {name}{'' if weights is None else ' weights'}"
            yield label, partial(merge_tokens, x, index, 945, weights)
            grad, sizes = empty(BATCH, 945, dim, dtype=x.dtype), empty(BATCH, 945)
            yield label, partial(merge_tokens_backward, grad, index, weights, sizes)


def _masks(num_classes: int, name: str, channels_last: bool = True) -> Tensor:
    """``(B, K, h, w)``, by default channels-last as decoders leave them. No K here is a multiple of 16."""
    if channels_last:
        return empty(BATCH, GRID, GRID, num_classes, dtype=DTYPES[name]).permute(0, 3, 1, 2)
    return empty(BATCH, num_classes, GRID, GRID, dtype=DTYPES[name])


def _groups(name: str) -> tuple[Tensor, Tensor]:
    """Masks ``(B, 150, 600)`` of groups, channels-last, and the groups of the patches."""
    return empty(BATCH, 600, 150, dtype=DTYPES[name]).mT, empty(BATCH, GRID, GRID, dtype=torch.int64)


def _upsample_argmax(half: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for patch in (1, 2, 4, 8, 16):
        size = (GRID * patch, GRID * patch)
        for num_classes in (19, 150, 1000):
            for name in (half, "fp32"):
                for layout in ("channels-last", "contiguous"):
                    masks = _masks(num_classes, name, layout == "channels-last")
                    label = f"{patch}x{patch} K={num_classes} {name} {layout}"
                    yield label, partial(upsample_argmax, masks, size, size, False)
    size = (GRID * 16,) * 2
    yield "16x16 K=150 fp64", partial(upsample_argmax, _masks(150, "fp64"), size, size, False)
    for name in (half, "fp32"):
        masks, index = _groups(name)
        yield f"16x16 K=150 {name} groups", partial(upsample_argmax, masks, size, size, False, index)
    wide = (1 << 29) + 1  # rows, whose positions pass 32 bits
    yield f"wide K=150 {half}", partial(upsample_argmax, _masks(150, half), (wide, GRID), (16, GRID), False)


def _upsample_softmax(half: str) -> Iterator[tuple[str, Callable[[], object]]]:
    size = (GRID * 16,) * 2
    for name in (half, "fp32"):
        (masks, index), probabilities = _groups(name), empty(BATCH, 150, *size, dtype=DTYPES[name])
        label = f"K=150 P=16 {name} groups"
        yield label, partial(upsample_softmax, masks, size, size, False, index)
        yield label, partial(upsample_softmax_backward, probabilities, probabilities, (600,), size, False, index)
    cases = [(half, num_classes, patch) for num_classes in (19, 150, 1000) for patch in (4, 16)]
    for name, num_classes, patch in (*cases, ("fp64", 150, 16), ("fp32", 150, 16)):
        label, masks, size = f"K={num_classes} P={patch} {name}", _masks(num_classes, name), (GRID * patch,) * 2
        probabilities = empty(BATCH, num_classes, *size, dtype=DTYPES[name])
        yield label, partial(upsample_softmax, masks, size, size, False)
        yield label, partial(upsample_softmax_backward, probabilities, probabilities, (GRID, GRID), size, False)
    odd = probabilities[..., :333, :333]
    yield f"{label} odd", partial(upsample_softmax, masks, (333, 333), (333, 333), False)
    yield f"{label} odd", partial(upsample_softmax_backward, odd, odd, (GRID, GRID), (333, 333), False)
    wide, probabilities = (1 << 29) + 1, probabilities[..., :16, :]
    yield f"{label} wide", partial(upsample_softmax, masks, (wide, size[1]), (16, size[1]), False)
    arguments = probabilities, probabilities, (GRID, GRID), (wide, size[1]), False
    yield f"{label} wide", partial(upsample_softmax_backward, *arguments)


def _upsample_cross_entropy(half: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Letters of a label: g a gradient, w class weights, s smoothing, i an index; "pixels" is reduction "none"."""
    cases = [(half, num_classes, patch, "g") for num_classes in (19, 150, 1000) for patch in (4, 8, 16)]
    cases += [("fp64", 150, 16, "g"), ("fp32", 150, 16, "g"), ("fp32", 150, 16, "wsg"), (half, 150, 16, "gi")]
    cases += [("fp32", 150, 16, "wsgi"), (half, 150, 16, "")]

    def step(masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool) -> None:
        loss, parts = upsample_cross_entropy(masks, target, options, with_grad)
        if with_grad:
            scale_gradient(loss, parts, masks, options.groups)

    for name, num_classes, patch, present in cases:
        masks, index = _groups(name) if "i" in present else (_masks(num_classes, name), None)
        size = (GRID * patch, GRID * patch)
        target = empty(BATCH, *size, dtype=torch.int64)
        weight, smoothing = empty(num_classes) if "w" in present else None, 0.1 if "s" in present else 0.0
        options = LossOptions(size, 255, weight, smoothing, "mean", False, index)
        label = f"K={num_classes} P={patch} {name} {present}".strip()
        yield label, partial(step, masks, target, options, "g" in present)
    wide = torch.empty_strided(masks.shape, (1 << 33, 1 << 26, 1 << 5, 1), dtype=masks.dtype, device="meta")
    yield f"{label} g wide", partial(step, wide, target, options, True)
    options = options._replace(reduction="none")
    yield f"{label} pixels", partial(upsample_cross_entropy, masks, target, options, False)
    yield f"{label} g pixels", partial(pixel_backward, empty(target.shape), masks, target, options)
