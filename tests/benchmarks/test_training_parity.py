"""Training with the fast kernels gives the reference's loss curve, in bfloat16 as nearly as the reference does.

Both models train from the same weights on the same data, drawn by step: smooth random regions, each class a colour of
its own under noise; SGD with momentum and the polynomial decay of the paper.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import Segmenter, SegmenterConfig
from segmenter_fast.benchmarks.training import StepShape
from segmenter_fast.reference import ReferenceSegmenter

TOLERANCE = 1e-4
STEPS = 50
SHAPE = StepShape("t", patch=8, classes=8, size=48, batch=4)
SMALL = {"embed_dim": 64, "num_heads": 1, "decoder_num_heads": 1, "depth": 2, "decoder_depth": 1}


def data(shape: StepShape, step: int) -> tuple[Tensor, Tensor]:
    """``(B, 3, S, S)`` images and ``(B, S, S)`` labels with a border of ignored pixels."""
    generator = torch.Generator().manual_seed(step)
    colours = torch.randn(shape.classes, 3, generator=torch.Generator().manual_seed(2**31))
    scores = torch.randn(shape.batch, shape.classes, 5, 5, generator=generator)
    target = F.interpolate(scores, size=(shape.size, shape.size), mode="bicubic").argmax(1)
    images = colours[target].permute(0, 3, 1, 2)
    images = images + 0.5 * torch.randn(images.shape, generator=generator)
    target[:, :2] = target[:, :, -3:] = 255
    return images, target


def losses(
    kind: type[Segmenter] | type[ReferenceSegmenter],
    dtype: torch.dtype = torch.float32,
    lr: float = 0.2,
    steps: int = STEPS,
    shape: StepShape = SHAPE,
    seed: int = 0,
    **fields: int,
) -> np.ndarray:
    """The loss of each step."""
    config: SegmenterConfig = shape.config.replace(**(SMALL | fields))
    torch.manual_seed(seed)
    weights = Segmenter(config).state_dict()
    model = kind(config).train()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, STEPS, power=0.9)
    curve = []
    for step in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = model.loss(*data(shape, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return np.array(curve)


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a - b) / b).max())


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return losses(ReferenceSegmenter)


def test_fifty_steps_in_float32_agree_to_a_ten_thousandth(reference: np.ndarray) -> None:
    curve = losses(Segmenter)
    assert relative_difference(curve, reference) <= TOLERANCE
    assert np.mean(curve[-5:]) < 0.6 * curve[0], "it does learn"
    other = losses(Segmenter, seed=1)
    assert relative_difference(losses(ReferenceSegmenter, seed=1), other) <= TOLERANCE


def test_bfloat16_is_as_near_to_float32_as_the_reference(reference: np.ndarray) -> None:
    def distance(curve: np.ndarray) -> float:
        return float(np.sqrt(((curve - reference)[1:] ** 2).mean()))

    ours = distance(losses(Segmenter, torch.bfloat16))
    assert 0 < ours <= 2 * distance(losses(ReferenceSegmenter, torch.bfloat16))


def test_another_learning_rate_is_found(reference: np.ndarray) -> None:
    """A hundredth more is more than rounding, so the comparison can fail."""
    assert relative_difference(losses(Segmenter, lr=0.202, steps=10), reference[:10]) > TOLERANCE


@pytest.mark.interpret
def test_the_triton_kernels_train_alike() -> None:
    shape = StepShape("t", patch=8, classes=3, size=16, batch=1)
    expected, curve = (losses(kind, steps=3, shape=shape, depth=1) for kind in (ReferenceSegmenter, Segmenter))
    assert curve == pytest.approx(expected, rel=TOLERANCE)
