"""Labels of trained models survive low precision: nearly all are equal, the others were undecided."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter
from support.models import FAMILIES, pair

COLOURS = torch.tensor([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]).float()


def scenes(count: int, cell: int, side: int = 128) -> tuple[Tensor, Tensor]:
    """Coloured squares with noise, and their classes."""
    target = torch.randint(0, 5, (count, side // cell, side // cell))
    target = target.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    images = COLOURS[target].permute(0, 3, 1, 2)
    return images + 0.3 * torch.randn_like(images), target


@functools.cache
def trained(family: str) -> sf.Segmenter:
    """A model of the family after a few steps on scenes, well above chance."""
    torch.manual_seed(0)
    model = sf.create_model(pair(family)[0].config, drop_path_rate=0.0)
    cell = 2 * model.config.patch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = model.loss(*scenes(4, cell, 4 * cell))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_labels_agree_but_for_ties_within_rounding(family: str, dtype: torch.dtype) -> None:
    with torch.enable_grad():
        model = trained(family)
    images, target = scenes(4, 2 * model.config.patch_size, 8 * model.config.patch_size)
    reference = ReferenceSegmenter(model.config).eval()
    reference.load_state_dict(model.state_dict())
    logits = reference(images)
    fast = model.optimize(dtype, compile=False)
    labels, error = fast.segment(images).long(), (fast(images).float() - logits).abs().max()
    assert (logits.argmax(1) == target).float().mean() > 0.5, "the model has not learnt anything"
    differ = labels != logits.argmax(1)
    assert differ.float().mean() < 0.01
    margin = logits.amax(1) - logits.gather(1, labels[:, None])[:, 0]
    assert (margin[differ] <= 2 * error).all()
