"""Random shapes, strides, dtypes and values for every op, against its reference; ``FUZZ_CASES=10000`` for long."""

from __future__ import annotations

import collections
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from support.accuracy import assert_as_accurate, assert_op_equals, largest_shortfall, with_gradients

CASES = int(os.environ.get("FUZZ_CASES", "200"))
FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECIAL = (float("inf"), float("-inf"), float("nan"))
Case = Callable[[random.Random], str]
Options = dict[str, Any]


def values(draw: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of one magnitude, of any; some are 0, or all are one value."""
    drawn = torch.randn(shape, dtype=torch.float64) * draw.choice([1e-4, 0.1, 1.0, 1.0, 3.0, 30.0])
    if draw.random() < 0.1:
        drawn = drawn * (torch.rand(shape) < 0.5)
    if draw.random() < 0.05 and drawn.numel():
        drawn = drawn.flatten()[0].expand(shape)
    return drawn.to(dtype).contiguous()


def normal(draw: random.Random, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers as a network has them, so that errors are rounding and not its cancellation."""
    return (torch.randn(shape, dtype=torch.float64) * draw.choice([0.1, 1.0, 3.0])).to(dtype)


def check(
    op: Callable[..., Tensor], peer: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None, **options: Any
) -> None:
    """Hold output and gradients to four times PyTorch's error; thousands of draws reach beyond the two of a test.

    float64 is its own oracle, and only to be equal to its peer.
    """
    if inputs[0].dtype == torch.float64:
        assert_op_equals(op, peer, inputs, grad, **options)
        return
    ours, theirs = (with_gradients(each, inputs, grad, **options) for each in (op, peer))
    oracle = with_gradients(peer, [tensor.double() for tensor in inputs], grad, **options)
    for results in zip(ours, theirs, oracle, strict=True):
        assert_as_accurate(*results, factor=4, ulps=16)


def strided(draw: random.Random, tensor: Tensor, last: bool = False) -> Tensor:
    """The same values in another layout; with ``last`` the last stride stays 1."""
    dims = list(range(tensor.ndim - last))
    match draw.randrange(5):
        case 0:  # another order of the dimensions
            order = [*draw.sample(dims, len(dims)), *([tensor.ndim - 1] if last else [])]
            back = [order.index(dim) for dim in range(tensor.ndim)]
            return tensor.permute(order).contiguous().permute(back)
        case 1:  # every second element of a larger tensor, with an offset
            dim = draw.choice(dims)
            larger = torch.full(
                [side * 2 + 1 if at == dim else side for at, side in enumerate(tensor.shape)], torch.nan
            )
            larger = larger.to(tensor.dtype)
            view = larger.narrow(dim, 1, tensor.shape[dim] * 2) if tensor.shape[dim] else larger.narrow(dim, 0, 0)
            view = view.unflatten(dim, (-1, 2)).select(dim + 1, 0) if tensor.shape[dim] else view
            return view.copy_(tensor)
        case 2 if tensor.shape[0]:  # one batch entry for all
            return tensor[:1].expand_as(tensor)
    return tensor


def gradient(draw: random.Random, out: Tensor) -> Tensor | None:
    return normal(draw, *out.shape) if out.ndim else None


def sdpa(qkv: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's op, which computes the gradient as ours does; the reference's loses less where one score is largest."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attention(draw: random.Random) -> str:
    dtype = draw.choice(FLOATS)
    shape = (
        draw.randrange(3),
        draw.choice([1, 2, 5, 17, 64, 65]),
        3,
        draw.randrange(1, 4),
        draw.choice([1, 3, 16, 32, 80]),
    )
    qkv = strided(draw, values(draw, *shape, dtype=dtype), last=True)
    scale = draw.choice([None, None, 0.3, 2.0, -0.5, 0.0])
    grad = gradient(draw, qkv[:, :, 0])
    check(kernels.attention, sdpa, [qkv], grad, scale=scale)
    return f"attention {dtype}"


def mask_scores(draw: random.Random) -> str:
    dtype = draw.choice(FLOATS)
    b, n, k, d = (
        draw.randrange(3),
        draw.choice([1, 2, 9, 40]),
        draw.choice([5, 19, 150]),
        draw.choice([8, 33, 64]),
    )
    shapes = ((b, n, d), (b, k, d), (k,), (k,))
    inputs = [normal(draw, *shape, dtype=dtype) for shape in shapes]
    inputs = [strided(draw, inputs[0]), strided(draw, inputs[1]), *inputs[2:]]
    eps = draw.choice([1e-5, 1e-6, 1e-3])
    check(
        lambda *given: kernels.mask_scores(*given, eps),
        lambda *given: reference.mask_scores(*given, eps),
        inputs,
        normal(draw, b, n, k),
    )
    return f"mask_scores {dtype}"


def upsampling(draw: random.Random, fewest: int = 1) -> tuple[Tensor, list[int], list[int], bool]:
    """Masks of at least so many classes, size, crop, align_corners."""
    k = draw.choice([fewest, 2, 3, 7, 19, 150, 257])
    shape = (draw.randrange(3), k, draw.randrange(1, 8), draw.randrange(1, 8))
    masks = strided(draw, values(draw, *shape, dtype=draw.choice(FLOATS)))
    size = [draw.choice([1, side, 2 * side, 4 * side, draw.randrange(1, 30)]) for side in shape[2:]]
    return masks, size, [draw.choice([side, draw.randrange(1, side + 1)]) for side in size], draw.random() < 0.3


def upsample_softmax(draw: random.Random) -> str:
    masks, *options = upsampling(draw)
    grad = normal(draw, *masks.shape[:2], *options[1])
    check(
        lambda given: kernels.upsample_softmax(given, *options),
        lambda given: reference.upsample_softmax(given, *options),
        [masks],
        grad,
    )
    return f"upsample_softmax {masks.dtype}"


def upsample_argmax(draw: random.Random) -> str:
    masks, *options = upsampling(draw)
    special = draw.random() < 0.3 and masks.numel() > 0
    if special:
        masks = masks.clone()
        for _ in range(draw.randrange(1, 4)):
            masks[tuple(draw.randrange(side) for side in masks.shape)] = draw.choice(SPECIAL)
    labels = kernels.upsample_argmax(masks, *options)
    logits = reference.upsample(masks.double(), *options)
    assert labels.shape == (len(masks), *options[1])
    assert labels.dtype == (torch.uint8 if masks.shape[1] <= 256 else torch.int32)
    plain = logits.isfinite().all(1)  # elsewhere torch.argmax says what wins
    if not plain.all():
        assert torch.equal(labels.long()[~plain], logits.argmax(1)[~plain]), (
            "another class wins where not all is finite"
        )
    if plain.any():
        scores = logits.movedim(1, -1)[plain]
        tolerance = 8 * torch.finfo(masks.dtype if masks.dtype == torch.float64 else torch.float32).eps
        bound = tolerance * max(1.0, masks[masks.isfinite()].abs().max().item())
        assert largest_shortfall(labels[plain], scores, -1) <= bound
    return f"upsample_argmax {masks.dtype}{' with infinities and NaN' if special else ''}"


def upsample_cross_entropy(draw: random.Random) -> str:
    masks, size, crop, align = upsampling(draw, fewest=2)  # the gradient of one class is 0, and ours is rounding
    masks = masks if len(masks) else values(draw, 1, *masks.shape[1:])
    k, ignore = masks.shape[1], draw.choice([255, 255, 0, -100])
    dtype = torch.int32 if k > 256 or ignore < 0 else draw.choice([torch.int64, torch.int32, torch.int16, torch.uint8])
    target = torch.randint(0, k, (len(masks), *crop)).where(torch.rand(len(masks), *crop) < 0.8, ignore).to(dtype)
    options: Options = {
        "size": tuple(size),
        "ignore_index": ignore,
        "weight": draw.choice([None, torch.rand(k) + 0.1]),
        "label_smoothing": draw.choice([0.0, 0.0, 0.1, 1.0]),
        "reduction": draw.choice(["mean", "sum", "none"]),
        "align_corners": align,
    }

    def loss(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def call(given: Tensor) -> Tensor:
            weight = options["weight"]
            wide = (
                given.dtype if given.dtype == torch.float64 or op is kernels.upsample_cross_entropy else torch.float32
            )
            weight = (
                weight
                if weight is None
                else weight.to(torch.float64 if given.dtype == torch.float64 else torch.float32)
            )
            return op(given.to(wide), target, **{**options, "weight": weight})

        return call

    grad = normal(draw, *target.shape) if options["reduction"] == "none" else None
    check(loss(kernels.upsample_cross_entropy), loss(reference.upsample_cross_entropy), [masks], grad)
    wrong = target.clone()
    wrong.view(-1)[draw.randrange(wrong.numel())] = k if k not in (ignore, 256) else k + 1
    if k <= 250:
        with pytest.raises(IndexError):
            kernels.upsample_cross_entropy(masks, wrong, **options)
    return f"upsample_cross_entropy {masks.dtype}"


def lattice(draw: random.Random) -> str:
    dtype, count, k = draw.choice([torch.float32, torch.float64]), draw.randrange(1, 4), draw.choice([1, 2, 5, 33, 257])
    sides, points = [draw.randrange(1, 25) for _ in range(2)], [draw.randrange(1, 9) for _ in range(2)]
    scores, tables = values(draw, count * points[0] * points[1], k, dtype=dtype), list[Tensor]()
    for axis, step in ((0, points[1]), (1, 1)):
        ends = torch.randint(0, points[axis], (count, 2, sides[axis]))
        ends = ends.sort(2).values if draw.random() < 0.5 else ends
        first = torch.arange(count)[:, None, None] * points[0] * points[1] * (axis == 0)
        tables += [(ends * step + first).contiguous(), torch.rand(count, sides[axis], dtype=dtype)]
    double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in (scores, *tables)]
    expected, ours = reference.lattice_softmax(*double), kernels.lattice_softmax(scores, *tables)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, expected)
    else:
        assert_as_accurate(ours, reference.lattice_softmax(scores, *tables), expected)
    votes = reference.lattice_logits(*double)[0] if count == 1 else expected
    bound = 16 * torch.finfo(dtype).eps * max(1.0, scores.abs().max().item())
    assert largest_shortfall(kernels.lattice_argmax(scores, *tables), votes, 0) <= bound
    return f"lattice {dtype}"


def hostile(draw: random.Random) -> str:
    """Arguments of wrong shapes and dtypes: one clear error."""

    def any_tensor() -> Any:
        shape = [draw.randrange(4) for _ in range(draw.randrange(6))]
        return draw.choice([torch.zeros(shape), torch.zeros(shape, dtype=draw.choice([torch.int64, torch.complex64]))])

    op = draw.choice([name for name in kernels.__all__ if name != "reference"])
    count = {"attention": 1, "mask_scores": 4, "upsample_cross_entropy": 2}.get(
        op, 5 if op.startswith("lattice") else 1
    )
    given = [any_tensor() for _ in range(count)]
    if op in ("upsample_argmax", "upsample_softmax"):
        given.append(draw.choice([(3, 4), (0, 1), (2,), (-1, 5), (3, 4, 5)]))
    try:
        getattr(kernels, op)(*given)
    except (ValueError, TypeError, IndexError):
        return f"hostile {op}: refused"
    return f"hostile {op}: taken"


KINDS: list[Case] = [
    attention,
    mask_scores,
    upsample_softmax,
    upsample_argmax,
    upsample_cross_entropy,
    lattice,
    hostile,
]


def test_every_op_equals_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    wrong, start = [], time.perf_counter()
    for case in range(CASES):
        torch.manual_seed(case)
        kind = KINDS[case % len(KINDS)]
        try:
            counts[kind(random.Random(case))] += 1
        except Exception as error:
            wrong.append(f"case {case}, {kind.__name__}: {type(error).__name__}: {str(error)[:200]}")
    with capsys.disabled():
        found = "".join(f"\n  {name}: {count}" for name, count in sorted(counts.items()))
        print(f"\n{CASES} calls of ops in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong{found}")
    assert not wrong, "\n".join(wrong[:20])
    assert len(counts) > len(KINDS)
