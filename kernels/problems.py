"""Named problems and their static bounds on an H100, beside the least that any implementation must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .costs import ASSUMED, CLOCK, SCHEDULERS, TARGET, cost
from .gpu.attention_backward import attention_backward
from .gpu.attention_forward import attention_forward
from .gpu.best_match import best_match
from .gpu.bipartite_groups import bipartite_groups
from .gpu.lattice_argmax import lattice_argmax
from .gpu.launches import bind, empty
from .gpu.mask_scores import mask_scores, mask_scores_backward
from .gpu.merge_tokens import merge_tokens
from .gpu.upsample_argmax import upsample_argmax
from .gpu.upsample_cross_entropy import scale_gradient, upsample_cross_entropy
from .gpu.upsample_softmax import upsample_softmax
from .gpu.upsample_softmax_backward import upsample_softmax_backward
from .loss_options import LossOptions
from .sass import PIPES

# A second of an H100 SXM: bytes, exponentials, floating point operations of matrix products.
RATES = {"bytes": 3.35e12, "exponentials": SCHEDULERS * 4 * CLOCK, "matrix products": SCHEDULERS * 1024 * CLOCK}

bf16 = partial(empty, dtype=torch.bfloat16)


class Problem(NamedTuple):
    """A call of an op, the least that it must do (in the order of RATES), and values that its data decide."""

    name: str
    call: Callable[[], object]
    least: tuple[float, float, float]
    assumed: dict[str, float]


def problems() -> Iterator[Problem]:
    """8 images, bfloat16: channels-last masks to 512 x 512, 1025 tokens of 12 heads of 64, 1024 patches of 768."""
    size, pixels = (512, 512), 8 * 512 * 512
    for classes, patch in ((150, 16), (150, 8), (19, 16)):
        masks, target = _masks(classes, patch), empty(8, *size, dtype=torch.int64)
        options = LossOptions(size, 255, None, 0.0, "mean", align_corners=False)
        call: Callable[[], object] = partial(_loss_and_gradient, masks, target, options)
        # A pass for the sum of the exponentials, a pass for the gradient.
        least = (_bytes(masks, masks, target), 2 * classes * pixels, 0)
        yield Problem(f"cross-entropy and gradient, K={classes}, patch {patch}", call, least, {})
    masks, probabilities = _masks(150, 16), bf16(8, 150, *size)
    call = partial(upsample_softmax, masks, size, size, False)
    yield Problem("softmax, K=150, patch 16", call, (_bytes(masks, probabilities), 150 * pixels, 0), {})
    call = partial(upsample_softmax_backward, probabilities, probabilities, (32, 32), size, False)
    least = (_bytes(masks, probabilities, probabilities), 0, 0)
    yield Problem("softmax backward, K=150, patch 16", call, least, {})
    for kind, few, patch in (("smooth, 2 candidates", 1, 16), ("smooth, 2 candidates", 1, 8), ("noise", 0, 16)):
        masks = _masks(150, patch)
        call = partial(upsample_argmax, masks, size, size, False)
        yield Problem(f"argmax, {kind}, K=150, patch {patch}", call, (_bytes(masks) + pixels, 0, 0), {"few": few})
    index, weights = empty(2, 2, 512, dtype=torch.int64), empty(2, 512)
    lattice = empty(1024, 150), index, weights, index, weights
    least = (_bytes(*lattice) + 512 * 512, 2 * 2 * 150 * 512 * 512, 0)
    yield Problem("votes of two lattices, K=150, 512 x 512", partial(lattice_argmax, *lattice), least, {})
    qkv, out, lse = bf16(8, 1025, 3, 12, 64), bf16(8, 1025, 12, 64), empty(8, 12, 1025)
    scores = 8 * 12 * 1025**2
    call = partial(attention_forward, qkv, 0.125, True)
    yield Problem("attention", call, (_bytes(qkv, out), scores, 4 * 64 * scores), {})
    call = partial(attention_backward, out, qkv, out, lse, 0.125)
    yield Problem("attention backward", call, (_bytes(qkv, qkv, out, out), scores, 10 * 64 * scores), {})
    call = partial(attention_forward, qkv, 0.125, False, empty(8, 1025))
    yield Problem("attention with a bias", call, (_bytes(qkv, out), scores, 4 * 64 * scores), {})
    for tokens, dim in ((1024, 384), (1024, 768), (4096, 384)):
        yield _merging(tokens, dim)
    inputs, norm, grad = (bf16(8, 1024, 768), bf16(8, 150, 768)), bf16(150), bf16(8, 1024, 150)
    least = (_bytes(*inputs, grad), 0, 2 * 768 * grad.numel())
    call = partial(mask_scores, *inputs, norm, norm, 1e-5)
    yield Problem("mask scores, K=150", call, least, {})
    call = partial(mask_scores_backward, grad, *inputs, norm, norm, 1e-5)
    yield Problem("mask scores backward, K=150", call, (2 * least[0], 0, 3 * least[2]), {})


def _merging(tokens: int, dim: int) -> Problem:
    """Match by 128 channels, group and merge 8 % of the tokens, with a class token.

    The products are the least that matching does.
    """
    x, z, groups = bf16(8, 1 + tokens, dim), bf16(8, tokens, 128), 1 + tokens - round(0.08 * tokens)

    def call() -> None:
        value, match = best_match(z[:, 1::2], z[:, ::2], None)
        index = bipartite_groups(value, match, tokens, 1 + tokens - groups, 1, None)
        merge_tokens(x, index, groups, empty(8, 1 + tokens))

    least = (2 * _bytes(x) + _bytes(z), 0, 8 * tokens**2 * 128 / 2)
    # Sources merge with different destinations: groups of two, of which a program sees those of its window and owns
    # a part. The loops over ``members`` visit a block of the window.
    merged = 1 + tokens - groups
    window = 2 * merged * min(1024 / groups, 1)
    data = {"full": tokens / 2, "full < end": 0, "members": window, "group < groups": merged * 4 / groups}
    data["token < seq_len"] = 2 / max(window / 128, 1)
    return Problem(f"merge tokens, {tokens} of {dim}", call, least, data)


def _loss_and_gradient(masks: Tensor, target: Tensor, options: LossOptions) -> None:
    loss, parts = upsample_cross_entropy(masks, target, options, True)
    scale_gradient(loss, parts, masks)


def _masks(classes: int, patch: int) -> Tensor:
    return bf16(8, 512 // patch, 512 // patch, classes).permute(0, 3, 1, 2)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(only: str = "") -> list[dict[str, Any]]:
    """Costs and floors of all problems whose name contains ``only``, as they are written to JSON."""
    found = []
    for name, call, least, assumed in (problem for problem in problems() if only in problem.name):
        launches = [cost(launch, assumed) for launch in bind(TARGET, iter([(name, call)]))]
        floors = {kind: 1e6 * work / rate for work, (kind, rate) in zip(least, RATES.items(), strict=True)}
        found.append({"problem": name, "floor_us": floors, "assumed": ASSUMED | assumed, "launches": launches})
    return found


def issue_us(problem: dict[str, Any]) -> float:
    """The issue-bound time of a measured problem, all of its launches together."""
    return sum(one["us"]["issue"] for one in problem["launches"])


def table(found: list[dict[str, Any]]) -> str:
    """The costs as text: problems with their launches, then the innermost loops."""
    headings = f"{'issue us':>8} {'slowest pipe':>15} {'floor':>7} registers  shared  CTAs warps of an SM"
    lines = [
        "Static bound, not a time: H100, 132 x 4 schedulers at 1.755 GHz, every issue slot used, no cache missed.",
        f"{'problem, kernel':58} {headings}",
    ]
    for problem in found:
        lines.append(f"{problem['problem']:58} {issue_us(problem):8.1f} {max(problem['floor_us'].values()):23.1f}")
        for one in problem["launches"]:
            slowest = max(PIPES, key=lambda name: one["us"][name])
            label = f"  {one['kernel']} ({', '.join(str(value) for value in one['tile'].values())})"
            lines.append(
                f"{label:58} {one['us']['issue']:8.1f} {one['us'][slowest]:8.1f} {slowest:>6} {'':7} "
                f"{one['registers']:9} {one['shared']:7} {one['programs_sm']:5} {one['warps_sm']:5}"
            )
    lines += ["", "Innermost loops, static counts of a warp: passes, then those of one pass"]
    for problem in found:
        for one in problem["launches"]:
            lines.append(f"{problem['problem']}: {one['kernel']}")
            for loop in one["loops"]:
                words = (
                    f"{name} {value:.4g}" for name, value in loop.items() if isinstance(value, float | int) and value
                )
                kinds = (f"{name} {value}" for name, value in loop.items() if isinstance(value, dict) and value)
                lines.append(f"  {loop['loop']}: {', '.join((*words, *kinds))}")
    return "\n".join(lines)
