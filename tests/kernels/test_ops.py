"""Every op: torch.library.opcheck, compilation, equal bits, derivatives of all orders, errors for forward mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from support.accuracy import with_gradients

from .conftest import Backend

ops = torch.ops.segmenter_fast


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape).requires_grad_(grad)


def lattices(classes: int = 7) -> tuple[Tensor, ...]:
    rows, cols = torch.randint(0, 3, (2, 2, 5)), torch.randint(0, 3, (2, 2, 6))
    return torch.randn(5, classes), rows, torch.rand(2, 5), cols, torch.rand(2, 6)


MERGED = torch.arange(40).reshape(2, 20) ** 2 % 7


def groups() -> Tensor:
    """Groups of 4 x 5 patches."""
    return torch.randint(0, 6, (2, 4, 5))


GROUPS = torch.tensor([[[0, 1, 3], [3, 0, 3]], [[2, 2, 1], [1, 0, 2]]])
TARGET = torch.arange(2 * 13 * 17).reshape(2, 13, 17) % 3
OPERATORS = {
    "attention": lambda: (ops.attention, (draw(2, 5, 3, 2, 16), 0.25, True)),
    "attention without grad": lambda: (ops.attention, (draw(2, 5, 3, 2, 16, grad=False), 0.25, False)),
    "attention with a bias": lambda: (ops.attention, (draw(2, 5, 3, 2, 16), 0.25, True, draw(2, 5, grad=False))),
    "best_match": lambda: (
        ops.best_match,
        (draw(2, 5, 8, grad=False), draw(2, 6, 8, grad=False), torch.tensor([6, 3])),
    ),
    "bipartite_groups": lambda: (ops.bipartite_groups, (torch.rand(2, 4), torch.randint(5, (2, 4)), 9, 2, 1, None)),
    "lattice_argmax": lambda: (ops.lattice_argmax, lattices()),
    "lattice_softmax": lambda: (ops.lattice_softmax, lattices()),
    "merge_tokens": lambda: (ops.merge_tokens, (draw(2, 5, 8), torch.randint(3, (2, 5)), 3, torch.rand(2, 5))),
    "lattice_argmax of groups": lambda: (ops.lattice_argmax, (*lattices(), torch.tensor([4, 2, 2, 0, 1]))),
    "lattice_softmax of groups": lambda: (ops.lattice_softmax, (*lattices(), torch.tensor([4, 2, 2, 0, 1]))),
    "mask_scores": lambda: (ops.mask_scores, (draw(2, 5, 8), draw(2, 3, 8), draw(3), draw(3), 1e-5)),
    "unit_rows": lambda: (ops.unit_rows, (*(draw(*shape, grad=False) for shape in ((2, 5, 8), (8,), (8,))), 1e-5, 3)),
    "upsample_argmax": lambda: (ops.upsample_argmax, (draw(2, 3, 4, 5, grad=False), [16, 20], [13, 17], False)),
    "upsample_softmax": lambda: (ops.upsample_softmax, (draw(2, 3, 4, 5), [16, 20], [13, 17], False)),
    "upsample_cross_entropy mean": lambda: (
        ops.upsample_cross_entropy,
        (draw(2, 3, 4, 5), TARGET, [16, 20], 255, None, 0.0, "mean", False, True),
    ),
    "upsample_cross_entropy none": lambda: (
        ops.upsample_cross_entropy,
        (draw(2, 3, 4, 5), TARGET, [16, 20], 255, torch.rand(3), 0.1, "none", True, False),
    ),
    "upsample_argmax of groups": lambda: (
        ops.upsample_argmax,
        (draw(2, 3, 6, grad=False), [16, 20], [13, 17], False, groups()),
    ),
    "upsample_softmax of groups": lambda: (
        ops.upsample_softmax,
        (draw(2, 3, 6), [16, 20], [13, 17], False, groups()),
    ),
    "upsample_cross_entropy mean of groups": lambda: (
        ops.upsample_cross_entropy,
        (draw(2, 3, 6), TARGET, [16, 20], 255, None, 0.0, "mean", False, True, groups()),
    ),
    "upsample_cross_entropy none of groups": lambda: (
        ops.upsample_cross_entropy,
        (draw(2, 3, 6), TARGET, [16, 20], 255, torch.rand(3), 0.1, "none", True, False, groups()),
    ),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", OPERATORS)
def test_opcheck(case: str, device: str) -> None:
    with torch.device(device):
        op, args = OPERATORS[case]()
    args = [value.to(device) if isinstance(value, Tensor) and value is TARGET else value for value in args]
    torch.library.opcheck(op.default, tuple(args))


def cross_entropy(reduction: str, of_groups: bool = False) -> Callable[[Tensor], Tensor]:
    def loss(masks: Tensor) -> Tensor:
        target = TARGET[:1, :6, :8].to(masks.device)
        index = GROUPS[:1].to(masks.device) if of_groups else None
        options = {"label_smoothing": 0.1, "reduction": reduction}
        return kernels.upsample_cross_entropy(masks, target, (7, 9), index=index, **options)

    return loss


def softmax_of_groups(masks: Tensor) -> Tensor:
    return kernels.upsample_softmax(masks, (6, 9), (5, 9), index=GROUPS.to(masks.device))


# Differentiable public ops and the shapes of their inputs.
DIFFERENTIABLE = {
    "attention": (kernels.attention, [(2, 65, 3, 2, 32)]),
    "attention with a bias": (
        lambda qkv: kernels.attention(qkv, bias=qkv.detach()[:, :, 0, 0, 0]),
        [(2, 65, 3, 2, 32)],
    ),
    "merge_tokens": (lambda x: kernels.merge_tokens(x, MERGED.to(x.device), 7)[0], [(2, 20, 32)]),
    "mask_scores": (kernels.mask_scores, [(2, 100, 32), (2, 19, 32), (19,), (19,)]),
    "upsample_softmax": (lambda masks: kernels.upsample_softmax(masks, (6, 9), (5, 9)), [(2, 3, 2, 3)]),
    "upsample_cross_entropy mean": (cross_entropy("mean"), [(1, 3, 2, 3)]),
    "upsample_cross_entropy none": (cross_entropy("none"), [(1, 3, 2, 3)]),
    "upsample_softmax of groups": (softmax_of_groups, [(2, 3, 4)]),
    "upsample_cross_entropy of groups": (cross_entropy("mean", of_groups=True), [(1, 3, 4)]),
}
differentiable = pytest.mark.parametrize("case", DIFFERENTIABLE)


def problem(
    case: str, backend: Backend, dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """Op, inputs, and gradient of the output."""
    op, shapes = DIFFERENTIABLE[case]
    inputs = [torch.randn(shape, device=backend.device, dtype=dtype) for shape in shapes]
    return op, inputs, torch.randn_like(op(*inputs))


@differentiable
def test_compiles_without_a_graph_break(backend: Backend, case: str) -> None:
    op, inputs, grad_out = problem(case, backend)

    def step(*inputs: Tensor) -> Tensor:
        return op(*(tensor * 2 for tensor in inputs)) + 1

    torch.compiler.reset()  # one function is compiled at most eight times
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = with_gradients(step, inputs, grad_out)
    torch.testing.assert_close(with_gradients(compiled, inputs, grad_out), expected)


@pytest.mark.parametrize("case", ["upsample_argmax", "lattice_argmax", "lattice_softmax"])
def test_inference_compiles_without_a_graph_break(backend: Backend, case: str) -> None:
    op = getattr(kernels, case)
    masks, *others = lattices() if case.startswith("lattice") else (torch.randn(2, 5, 4, 4), (20, 24), (17, 24))
    others = [value.to(backend.device) if isinstance(value, Tensor) else value for value in others]
    masks = masks.to(backend.device)
    compiled = torch.compile(lambda masks: op(masks * 2, *others) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(masks), op(masks * 2, *others) + 1)


@differentiable
def test_same_input_same_bits(backend: Backend, case: str, poisoned: None) -> None:
    for dtype in backend.dtypes:
        op, inputs, grad_out = problem(case, backend, dtype)
        first, second = (with_gradients(op, inputs, grad_out) for _ in range(2))
        assert all(torch.equal(before, again) for before, again in zip(first, second, strict=True))


def penalty_gradients(op: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the size of a gradient, as penalties take them, and of the size of those."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    result: Tensor = op(*inputs)
    orders: list[tuple[Tensor, ...]] = []
    for _ in range(3):
        orders.append(torch.autograd.grad(result.square().sum(), inputs, create_graph=True))
        result = torch.cat([grad.flatten() for grad in orders[-1]])
    return tuple(grad.detach() for grads in orders for grad in grads)


@differentiable
def test_derivatives_of_higher_order(backend: Backend, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, inputs, _ = problem(case, backend)
    found = penalty_gradients(op, inputs)
    monkeypatch.setitem(globals(), "kernels", reference)
    expected = penalty_gradients(getattr(reference, op.__name__, op), inputs)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=float(plain.abs().max()) * 1e-2)


def test_hooks_and_autocast_under_a_second_derivative(backend: Backend) -> None:
    """A hook on an input sees its gradient once; autocast leaves the gradient's precision alone."""
    qkv, seen = torch.randn(2, 65, 3, 2, 32, device=backend.device, requires_grad=True), []
    qkv.register_hook(seen.append)
    out = kernels.attention(qkv)
    with torch.autocast(backend.device, torch.bfloat16):
        (found,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    (expected,) = torch.autograd.grad(out.square().sum(), qkv)
    assert len(seen) == 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_keys_that_are_left_out_under_a_second_derivative(backend: Backend) -> None:
    qkv = torch.randn(2, 5, 3, 1, 16, device=backend.device, requires_grad=True)
    bias = torch.tensor([[-torch.inf] * 5, [0, 0, 0, 0, -torch.inf]], device=backend.device)
    out = kernels.attention(qkv, bias=bias)
    (found,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    (expected,) = torch.autograd.grad(out.square().sum(), qkv)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@differentiable
def test_forward_mode_is_refused(backend: Backend, case: str) -> None:
    op, inputs, _ = problem(case, backend)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(op, tuple(inputs), tuple(inputs))


class NoGradient(torch.autograd.Function):
    """A consumer that gives no gradient back."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_consumer_without_a_gradient(backend: Backend, reduction: str) -> None:
    masks = torch.randn(1, 3, 4, 5, device=backend.device).requires_grad_()
    NoGradient.apply(cross_entropy(reduction)(masks)).sum().backward()
    assert masks.grad is None or not masks.grad.any()


@pytest.mark.parametrize("op", [kernels.lattice_argmax, kernels.lattice_softmax])
def test_lattices_have_no_gradient(op: Callable[..., Tensor]) -> None:
    arguments = lattices()
    for index in (0, 2, 4):
        with_grad = [*arguments]
        with_grad[index] = arguments[index].clone().requires_grad_()
        found = op(*with_grad)
        assert not found.requires_grad
        assert torch.equal(found, op(*arguments))
