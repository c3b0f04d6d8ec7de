"""Gradients through a resize that waits: checkpoints, penalties, ``torch.func``, and those by the logits themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segmenter_fast.accelerate import lazy_functions
from segmenter_fast.accelerate.full_size import FullSizeCalls
from segmenter_fast.accelerate.lazy import patch_scores
from support.lazy_pairs import IGNORED, assert_same_gradients, pair, resized
from support.tensor_chains import Double

pytestmark = pytest.mark.filterwarnings("ignore:.* made the logits")


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, fast, x, labels = pair()
    x.requires_grad_()
    assert_same_gradients(
        model,
        fast,
        lambda m: F.cross_entropy(checkpoint(m, x, use_reentrant=reentrant), labels, ignore_index=IGNORED),
    )


@pytest.mark.parametrize("full", [False, True])
def test_gradients_by_logits_whose_loss_is_computed(full: bool) -> None:
    leaf = torch.randn(2, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 12, 13))

    def found(mark: bool) -> tuple[Tensor, ...]:
        scores = patch_scores(leaf * 1, FullSizeCalls()) if mark else leaf * 1
        logits = resized(scores, 16)
        cropped = logits.double()[..., :12, :13]
        loss = 2 * F.cross_entropy(cropped, labels, ignore_index=0)
        loss = loss + logits.softmax(1).square().sum() + logits[1].max(0)[0].sum()
        if full:
            loss = loss + (logits.sin() * logits.detach()).sum()
        grads = torch.autograd.grad(loss, [logits, leaf], retain_graph=True)
        grads += torch.autograd.grad(loss, (cropped, logits, leaf), retain_graph=True)
        grads += torch.autograd.grad(loss.expand(2), logits, torch.eye(2), is_grads_batched=True, retain_graph=True)
        penalties = torch.autograd.grad(loss, (logits, cropped), create_graph=True)
        for wanted in (logits, leaf):  # of the loss's gradient, and of a Hessian's product with it
            grads += torch.autograd.grad(sum(x.square().sum() for x in penalties), wanted, create_graph=True)
            penalties = (*penalties, grads[-1])
        if mark:
            with pytest.raises(RuntimeError, match="input 1 was not used"):
                torch.autograd.grad(loss, (logits, torch.ones(1, requires_grad=True)), retain_graph=True)
        return grads + torch.autograd.grad(loss, logits)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, plain in zip(found(True), found(False), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["official", "mmseg"])
def test_gradient_penalty(name: str) -> None:
    """A loss with the gradient's size by the images, the logits and a parameter in it: second derivatives."""
    model, fast, x, labels = pair(name)

    def loss(m: nn.Module) -> Tensor:
        images = x.clone().requires_grad_()
        logits = m(images)
        value = F.cross_entropy(logits, labels, ignore_index=IGNORED)
        by = images, logits, next(m.parameters())
        penalty = sum(grad.square().sum() for grad in torch.autograd.grad(value, by, create_graph=True))
        return (
            value + penalty + torch.autograd.grad(logits.softmax(1).square().sum(), images, create_graph=True)[0].norm()
        )

    assert_same_gradients(model, fast, loss)


def test_gradient_penalty_through_a_function_of_the_user() -> None:
    """A resize that reaches the graph below PyTorch's Python functions."""
    leaf, found = torch.randn(2, 5, 4, 4, dtype=torch.float64, requires_grad=True), []
    for scores in (leaf * 1, patch_scores(leaf * 1, FullSizeCalls())):
        loss = Double.apply(resized(scores, (9, 13))).sin().sum()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).softmax(1).square().sum())(
        dict(m.named_parameters())
    ),
    "vmap": lambda m, x: torch.func.vmap(m)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda m, x: torch.func.vmap(torch.func.grad(lambda x: m(x[None]).square().sum()))(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "vmap of the logits": lambda m, x: torch.func.vmap(lambda logits: logits.argmax(0))(m(x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_run_the_models_own_forward(transform: str) -> None:
    model, fast, x, _ = pair()
    found, expected = (TRANSFORMS[transform](m, x) for m in (fast, model))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_forward_mode_by_a_weight() -> None:
    """The tangent of a projection's weight, which the tokens before it do not have."""
    model, fast, x, _ = pair()
    found = []
    for m in (model, fast):
        name, weight = next((name, p) for name, p in m.named_parameters() if name.endswith("qkv.weight"))
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = torch.autograd.forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
            logits = torch.func.functional_call(m, {name: dual}, (x,))
            found.append(torch.autograd.forward_ad.unpack_dual(logits).tangent)
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
    assert found[0].any()
