"""Weights of the classes: the numbers themselves, their gradient in a step, and what a resumed run keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from segmenter_fast.processes import StopRequest, World
from segmenter_fast.train.class_weights import class_weights, count_pixels, frequency_weights, given_weights
from segmenter_fast.train.datasets import SampleError, open_dataset
from segmenter_fast.train.engine import train
from segmenter_fast.train.stepping import Stepper
from support.folders import HEIGHT, WIDTH, write_folder
from support.training import RECIPE, Squares, small_model

NAMES = ("sky", "sea", "sand")


@pytest.mark.parametrize(
    ("wish", "expected"),
    [("1,2,0.5", [1, 2, 0.5]), ("sea=3", [1, 3, 1]), ("sand=0, sky=.25", [0.25, 1, 0]), ("1e-1,0,0", [0.1, 0, 0])],
)
def test_given_weights(wish: str, expected: list[float]) -> None:
    assert given_weights(wish, NAMES) == expected


@pytest.mark.parametrize(
    "wish", ["1,2", "1,2,3,4", "1,2,x", "1,2,-1", "1,2,inf", "1,2,nan", "see=2", "sea=2,sea=3", "sea=2,1", "frequent"]
)
def test_wrong_weights_say_what_is_allowed(wish: str) -> None:
    allowed = (
        "class_weights must be frequency, 3 numbers from 0 on .* NAME=NUMBER .* Classes of the data: sky, sea, sand"
    )
    with pytest.raises(ValueError, match=allowed):
        given_weights(wish, NAMES)
    with pytest.raises(ValueError, match="must leave a class that counts"):
        given_weights("0,0,0", NAMES)


def test_frequency_is_the_formula_of_enet() -> None:
    found = frequency_weights([750, 250, 0])
    assert found == pytest.approx([1 / math.log(1.77), 1 / math.log(1.27), 1 / math.log(1.02)])
    assert found == pytest.approx([1.7514, 4.1838, 50.4983], abs=1e-4)
    with pytest.raises(ValueError, match="needs labelled pixels"):
        frequency_weights([0, 0])


def test_pixels_of_a_folder(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path, values=(0, 1, 1, 255, 1)))
    labels = np.resize([0, 1, 1, 255, 1], (HEIGHT, WIDTH))
    expected = [3 * int((labels == place).sum()) for place in range(3)]
    assert count_pixels(dataset).tolist() == expected
    assert class_weights("frequency", dataset) == frequency_weights(expected)
    (tmp_path / "labels/train/b.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"b\.png cannot be read"):
        count_pixels(dataset)
    assert count_pixels(dataset, skip_broken=True).tolist() == [count // 3 * 2 for count in expected]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_has_the_loss_and_gradient_of_torch(accumulate: int) -> None:
    weights = [0.5, 2.0, 0.0, 1.0]
    recipe = RECIPE.replace(
        optimizer="sgd", momentum=0.0, lr=1.0, min_lr=1.0, label_smoothing=0.1, accumulate=accumulate
    )
    model, reference = (small_model(num_classes=4, drop_path_rate=0.0) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 4, (2, 32, 32), generator=generator)
    labels[:, :9] = 255
    stepper = Stepper(model, 255, recipe, 10, World.from_environment())
    stepper.weigh(weights)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = stepper.step(images, labels, StopRequest())
    loss = torch.nn.functional.cross_entropy(
        reference.train()(images), labels, torch.tensor(weights), ignore_index=255, label_smoothing=0.1
    )
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for old, new, wanted in zip(before, model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(old - new.detach(), wanted.grad, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Squares()
    recipe = RECIPE.replace(steps=2, class_weights="frequency", save_every=1, keep=9)
    train(small_model(num_classes=len(data.class_names)), data, None, recipe, tmp_path / "run", device="cpu")
    kept = json.loads((tmp_path / "run/run.json").read_text())
    assert kept["recipe"]["class_weights"] == "frequency"
    assert kept["class_weights"] == frequency_weights(count_pixels(data))
    (tmp_path / "run/checkpoints/step-0000002.pt").unlink()
    monkeypatch.setattr("segmenter_fast.train.engine.class_weights", lambda *_: pytest.fail("counted again"))
    again = small_model(num_classes=len(data.class_names))
    train(again, data, None, recipe, tmp_path / "run", resume="auto", device="cpu")
    assert json.loads((tmp_path / "run/run.json").read_text())["class_weights"] == kept["class_weights"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="class_weights is '', was 'frequency'"):
        train(
            again,
            data,
            None,
            RECIPE.replace(steps=2, save_every=1, keep=9),
            tmp_path / "run",
            resume="auto",
            device="cpu",
        )
    kept["class_weights"] = [1.0]
    (tmp_path / "run/run.json").write_text(json.dumps(kept))
    with pytest.raises(
        ValueError, match=r"run\.json must hold no class_weights, or \d numbers from 0 on, got \[1\.0\]"
    ):
        train(again, data, None, recipe, tmp_path / "run", resume="auto", device="cpu")


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    data, recipe = Squares(), RECIPE.replace(steps=2, save_every=1, keep=9)
    train(small_model(num_classes=len(data.class_names)), data, None, recipe, tmp_path / "run", device="cpu")
    path = tmp_path / "run/run.json"
    kept = json.loads(path.read_text())
    del kept["recipe"]["class_weights"], kept["model"]["label_values"], kept["class_weights"]
    path.write_text(json.dumps(kept))
    (tmp_path / "run/checkpoints/step-0000002.pt").unlink()
    again = small_model(num_classes=len(data.class_names))
    assert train(again, data, None, recipe, tmp_path / "run", resume="auto", device="cpu").steps == 2
