"""Loops of users on models of others before and after ``accelerate``: labels and training steps, time and peak memory.

Cases are the official program's structure (T/16, 512 px) and the loss of transformers' SegFormer at 1024 px, whose
scores are resized from 256; both with 150 classes, one image, float32, random weights. Each case is written to
``swap_in.json``. It is refused if more than 1e-4 of the labels differ, or the losses by more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast import accelerate, create_model
from segmenter_fast.reference import ReferenceSegmenter

from ..case import OURS, timed_rows
from ..results import RESULTS, CaseRows
from ..runner import Runner
from ..timing import own_stream
from .official import OfficialLike

OP, PLAIN = "swap_in", "as it is"
CLASSES, TOLERANCE = 150, 1e-4
Call = Callable[[], Tensor]


class Scores(nn.Module):
    """The scores ``(1, K, S / 4, S / 4)`` of a SegFormer for an image of side S, as its head returns them."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(1, CLASSES, side // 4, side // 4))

    def forward(self, _: Tensor) -> Tensor:
        return self.scores * 1


def run_swap_in(*, device: torch.device, seconds: float = 3.0, out: Path = RESULTS, side: int = 512) -> CaseRows:
    """Measure all cases; the SegFormer's image has twice the ``side``.

    Raises:
        ValueError: the results of an accelerated model differ.
    """
    runner = Runner.start(device, {torch.float32}, out, False, seconds)
    result = runner.result(OP)
    for name, loop, calls in _cases(device, side):
        own, ours = (call() for call in calls.values())
        off = (own != ours).double().mean() if loop.endswith("argmax") else ((ours - own) / own).abs()
        if not float(off) <= TOLERANCE:  # NaN is no agreement
            raise ValueError(f"{name}, {loop}: the results of the accelerated model differ from its own")
        with own_stream(device):
            rows = timed_rows(calls, device, 1, seconds=seconds, min_samples=4)
        parameters = {"model": name, "loop": loop, "classes": CLASSES, "batch": 1, "dtype": "float32"}
        runner.keep(result, parameters, rows, f"{name}, {loop}")
    return result.cases


def _cases(device: torch.device, side: int) -> Iterator[tuple[str, str, dict[str, Call]]]:
    """Model, loop, and the calls of both forms."""
    torch.manual_seed(0)
    with device:
        made = create_model("seg_t_mask_16", num_classes=CLASSES, image_size=side, drop_path_rate=0.0)
        official = [OfficialLike(ReferenceSegmenter(made.config)) for _ in range(2)]
        for model in official:
            model.load_state_dict(made.state_dict())
        segformer = [nn.Sequential(Scores(2 * side)) for _ in range(2)]
        segformer[1].load_state_dict(segformer[0].state_dict())
        images, labels = torch.randn(1, 3, side, side), torch.randint(CLASSES, (1, side, side))
        large = torch.randint(CLASSES, (1, 2 * side, 2 * side))
    accelerate(official[1])
    accelerate(segformer[1], heads="0")
    names = f"official T/16 {side} px", f"SegFormer's scores {2 * side} px"
    yield names[0], "forward, argmax", _pair(official, lambda m: _labels(m.eval(), images))
    yield names[0], "training step", _pair(official, lambda m: _step(m.train(), images, labels))
    yield names[1], "loss, backward", _pair(segformer, lambda m: _step(m, images, large, resize=True))


def _pair(models: Sequence[nn.Module], loop: Callable[[nn.Module], Tensor]) -> dict[str, Call]:
    return dict(zip((PLAIN, OURS), (partial(loop, model) for model in models), strict=True))


@torch.no_grad()
def _labels(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(1)


def _step(model: nn.Module, images: Tensor, labels: Tensor, resize: bool = False) -> Tensor:
    """The loss, after its backward pass; the parameters' gradients are dropped."""
    logits = model(images)
    if resize:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, labels, ignore_index=255)
    loss.backward()
    model.zero_grad()
    return loss.detach()
