"""The stepper: gradients of any parts and precision, steps that are skipped, state that comes back exactly."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.processes import StopRequest, World
from segmenter_fast.train import run_folder
from segmenter_fast.train.presets import Recipe
from segmenter_fast.train.stepping import Stepper, StepResult
from segmenter_fast.weights.reading import CheckpointError
from support.training import RECIPE, ROUNDING, difference, small_model, step_gradients


def noise(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 32, 32, generator=draw), torch.randint(0, 2, (4, 32, 32), generator=draw)


def trained(recipe: Recipe, steps: int) -> Stepper:
    """A stepper after some steps on noise."""
    stepper = Stepper(small_model(recipe), 255, recipe, 10, World())
    for seed in range(steps):
        stepper.step(*noise(seed), StopRequest())
    return stepper


def parameters(stepper: Stepper) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in stepper.model.parameters()]


def test_the_gradient_is_that_of_the_mean_over_labelled_pixels() -> None:
    recipe = RECIPE.replace(drop_path=0.0, label_smoothing=0.1)
    model, (images, labels) = small_model(recipe), noise(0)
    labels[0] = 255
    stepper = Stepper(small_model(recipe), 255, recipe, 10, World())
    loss = model.loss(images, labels, label_smoothing=0.1)
    loss.backward()
    before = parameters(stepper)
    result = stepper.step(images, labels, StopRequest())
    assert result.loss == pytest.approx(loss.item())
    assert (result.lr, result.updated, result.overflow, result.stop) == (recipe.lr, True, False, False)
    wanted = [parameter.grad for parameter in model.parameters()]
    assert result.norm == pytest.approx(torch.nn.utils.get_total_norm(wanted).item(), rel=1e-5)
    for old, new, gradient in zip(before, parameters(stepper), wanted, strict=True):
        torch.testing.assert_close(new, old - recipe.lr * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 3, 4])  # three: parts of two, one and one images
def test_parts_of_a_batch_change_nothing_but_rounding(accumulate: int) -> None:
    recipe = RECIPE.replace(drop_path=0.0)
    wanted, found = step_gradients(World(), recipe), step_gradients(World(), recipe.replace(accumulate=accumulate))
    assert found.keys() == wanted.keys()
    assert difference(found, wanted) < ROUNDING


def test_the_gradient_is_clipped_and_the_average_follows() -> None:
    recipe = RECIPE.replace(drop_path=0.0, momentum=0.0, clip=1e-3, ema=0.75)
    stepper = Stepper(small_model(recipe), 255, recipe, 10, World())
    before = parameters(stepper)
    norm = stepper.step(*noise(0), StopRequest()).norm
    moved = math.sqrt(sum((new - old).square().sum() for old, new in zip(before, parameters(stepper), strict=True)))
    assert norm > 1e-3
    assert moved == pytest.approx(recipe.lr * 1e-3, rel=1e-2)
    first = parameters(stepper)  # the first update copies the weights
    stepper.step(*noise(1), StopRequest())
    for old, new, mean in zip(first, parameters(stepper), stepper.averaged.parameters(), strict=True):
        torch.testing.assert_close(mean.detach(), 0.75 * old + 0.25 * new)


def test_a_step_draws_by_seed_and_step_alone() -> None:
    recipe = RECIPE.replace(drop_path=0.5)
    losses = []
    for start in (0, 7):
        torch.manual_seed(start)
        stepper = Stepper(small_model(recipe), 255, recipe, 10, World())
        torch.manual_seed(start)
        losses.append(stepper.step(*noise(0), StopRequest()).loss)
    assert losses[0] == losses[1]
    other = Stepper(small_model(recipe), 255, recipe.replace(seed=5), 10, World())
    assert other.step(*noise(0), StopRequest()).loss != losses[0]


def test_a_loss_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(small_model(), 255, RECIPE.replace(ema=0.5), 10, World())
    before = parameters(stepper)
    loss = sf.Segmenter.loss
    with monkeypatch.context() as patch:
        patch.setattr(sf.Segmenter, "loss", lambda *given, **options: loss(*given, **options) * float("nan"))
        result = stepper.step(*noise(0), StopRequest())
    assert math.isnan(result.loss)
    assert (result.updated, result.overflow, stepper.steps) == (False, False, 1)
    assert all(torch.equal(*pair) for pair in zip(before, parameters(stepper), strict=True))
    assert all(parameter.grad is None for parameter in stepper.model.parameters())
    assert stepper.step(*noise(1), StopRequest()).updated


def test_a_gradient_beyond_float16_is_an_overflow_and_lowers_the_scale() -> None:
    stepper = Stepper(small_model(), 255, RECIPE.replace(precision="float16"), 10, World())
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = parameters(stepper)
    result = stepper.step(*noise(0), StopRequest())
    assert math.isfinite(result.loss)
    assert (result.updated, result.overflow) == (False, True)
    assert stepper.scaler.get_scale() == 2.0**59
    assert all(torch.equal(*pair) for pair in zip(before, parameters(stepper), strict=True))


def test_a_noted_signal_is_in_the_result() -> None:
    request = StopRequest()
    request.signal = signal.SIGTERM
    result = Stepper(small_model(), 255, RECIPE, 10, World()).step(*noise(0), request)
    assert isinstance(result, StepResult)
    assert (result.stop, result.updated) == (True, True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_whole_state_comes_back(tmp_path: Path, optimizer: str) -> None:
    recipe = RECIPE.replace(optimizer=optimizer, ema=0.9, lr=1e-2)
    before = trained(recipe, 3)
    path = run_folder.save_checkpoint(tmp_path, before.state_dict())
    after = trained(recipe, 0)
    after.load_state_dict(run_folder.read_checkpoint(path))
    for name in ("model", "optimizer", "schedule", "scaler", "ema"):
        left, right = (getattr(stepper, name).state_dict() for stepper in (before, after))
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=name)
    assert after.steps == 3


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    content: dict[str, Any] = trained(RECIPE, 1).state_dict()
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 has no average of weights"):
        trained(RECIPE.replace(ema=0.5), 0).load_state_dict(content)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trained(RECIPE, 0).load_state_dict({**content, "model": small_model(embed_dim=64).state_dict()})
