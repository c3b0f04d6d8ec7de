"""The one measure of numerical agreement: error against a float64 oracle, relative to PyTorch's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, peer: Tensor, oracle: Tensor, *, factor: float = 2.0, ulps: float = 4.0) -> None:
    """Hold ``max|ours - oracle| <= factor * max|peer - oracle| + floor``.

    ``peer`` is PyTorch's own result in the same dtype, ``oracle`` the float64 one. The floor is ``ulps`` units in
    the last place of the largest oracle value, in the dtype of ``ours``. NaNs and infinities sit where the oracle's do.
    """
    assert ours.shape == oracle.shape, f"shape {tuple(ours.shape)}, oracle {tuple(oracle.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(ours.isnan(), oracle.isnan()), "NaNs differ from the oracle's"
    assert torch.equal(ours.isinf(), oracle.isinf()), "infinities differ from the oracle's"
    if not finite.any():
        return
    error = (ours.double() - oracle)[finite].abs().max().item()
    allowed = factor * (peer.double() - oracle)[finite].abs().max().item()
    floor = ulps * torch.finfo(ours.dtype).eps * oracle[finite].abs().max().item()
    assert error <= allowed + floor, f"error {error:.3g}, allowed {allowed:.3g} + floor {floor:.3g}"


def with_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor | None = None, **options
) -> tuple[Tensor, ...]:
    """Output of ``op(*inputs, **options)`` and the gradient of every input for ``grad_out``, 1 for a scalar output."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = op(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, None if grad_out is None else grad_out.to(out.dtype))
    return out.detach(), *grads


def assert_op_as_accurate(
    op: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_out: Tensor | None = None,
    **options,
) -> tuple[Tensor, ...]:
    """Hold output and gradients of ``op`` to the errors of ``peer``, which in float64 is the oracle; return them."""
    ours = with_gradients(op, inputs, grad_out, **options)
    theirs = with_gradients(peer, inputs, grad_out, **options)
    oracle = with_gradients(peer, [tensor.double() for tensor in inputs], grad_out, **options)
    for index, results in enumerate(zip(ours, theirs, oracle, strict=True)):
        name = f"gradient {index}" if index else "output"
        try:
            assert_as_accurate(*results)
        except AssertionError as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise AssertionError(f"{name} of {shapes} {inputs[0].dtype}: {error}") from None
    return ours


def assert_op_equals(
    op: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_out: Tensor | None = None,
    **options,
) -> None:
    """Hold output and gradients of ``op`` to those of ``peer`` in the same dtype; NaN equals NaN."""
    ours, theirs = (with_gradients(function, inputs, grad_out, **options) for function in (op, peer))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def largest_shortfall(labels: Tensor, oracle: Tensor, dim: int) -> float:
    """Largest difference between the best oracle score of a pixel and that of its label; classes lie along ``dim``."""
    chosen = oracle.gather(dim, labels.long().unsqueeze(dim)).squeeze(dim)
    return (oracle.amax(dim) - chosen).max().item()
